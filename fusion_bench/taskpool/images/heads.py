"""Text heads that are kept, so that no prompt is encoded twice."""

from safetensors.torch import load, save

from fusion_bench.sealed import read_sealed, write_sealed
from fusion_bench.storage import cache_dir, warn_not_kept
from fusion_bench.zero_shot import ZeroShotHead


class HeadStore:
    """Heads on disk, under the hash of what they were made from."""

    def __init__(self) -> None:
        self._root = cache_dir() / "heads"

    def load(self, identity: str) -> ZeroShotHead | None:
        """Return a head that was kept; a damaged file counts as none."""
        content = read_sealed(self._root / identity)
        return None if content is None else ZeroShotHead(**load(content))

    def save(self, identity: str, head: ZeroShotHead) -> None:
        """Keep a head; a disk that cannot take it is no reason to stop."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in head.state_dict().items()}
        try:
            write_sealed(self._root / identity, save(tensors))
        except OSError as error:
            warn_not_kept(error)
