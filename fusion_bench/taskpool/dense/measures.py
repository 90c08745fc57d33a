"""What is counted of one sample: sums, from which a metric follows for any number of samples.

Pixels are counted as integers. Errors are computed and added in float64 where the device has it
(Apple's has not): a sum of a million of them is then exact to nine digits and more.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def resized(found: Tensor, target: Tensor) -> Tensor:
    """Return a sample's values, (channels, h, w), at the target's resolution, (…, H, W)."""
    if found.shape[-2:] == target.shape[-2:]:
        return found
    whole = interpolate(found[None], size=target.shape[-2:], mode="bilinear", align_corners=False)
    return whole[0]


def overlaps(logits: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Return each class's intersection, then each class's union; and right pixels, all pixels.

    Pixels of ``ignore_index`` do not count, whatever is predicted there.

    Args:
        logits: (classes, h, w).
        target: classes, int64 of shape (h, w).
        ignore_index: the class of pixels without an answer.

    Returns:
        int64 of shapes (2 · classes,) and (2,).
    """
    classes = len(logits)
    predicted = logits.argmax(dim=0)
    counted = torch.ones_like(target, dtype=torch.bool)
    if ignore_index is not None:
        counted = target != ignore_index
    truth, predicted = target[counted], predicted[counted]
    right = truth[truth == predicted]
    both, one, other = (torch.bincount(own, minlength=classes) for own in (right, truth, predicted))
    pixels = torch.stack([both.sum(), one.sum()])
    return torch.cat([both, one + other - both]), pixels


def errors(found: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums over the pixels whose target is positive, each with the number of pixels.

    Args:
        found: (h, w).
        target: likewise; 0, negative numbers and what is not finite mean that nothing is known.

    Returns:
        The squared errors, and the absolute errors divided by the target; each of shape (2,).
    """
    known = torch.isfinite(target) & (target > 0)
    truth, off = target[known], found[known].to(target.dtype) - target[known]
    count = known.sum().to(target.dtype)
    return (
        torch.stack([off.square().sum(), count]),
        torch.stack([(off.abs() / truth).sum(), count]),
    )


def angles(found: Tensor, target: Tensor, limit: float = 11.25) -> tuple[Tensor, Tensor]:
    """Return the sum of the angles, and how many are below ``limit``; each with the pixels' number.

    Args:
        found: directions of any length, (3, h, w). One of no length is 90 degrees off.
        target: likewise; pixels of no length, or not finite, do not count.
        limit: in degrees.

    Returns:
        Two tensors of shape (2,).
    """
    known = torch.isfinite(target).all(dim=0) & (target != 0).any(dim=0)
    truth, found = target[:, known], found[:, known].to(target.dtype)
    # Exact for small angles too, where the arc cosine is not.
    across = torch.linalg.cross(found, truth, dim=0).norm(dim=0)
    off = torch.rad2deg(torch.atan2(across, (found * truth).sum(dim=0)))
    off = torch.where((found == 0).all(dim=0), 90.0, off)
    count = known.sum().to(target.dtype)
    near = (off < limit).sum().to(target.dtype)
    return torch.stack([off.sum(), count]), torch.stack([near, count])
