"""``python -m fusion_bench``."""

from fusion_bench.scripts.cli import main

if __name__ == "__main__":
    main()
