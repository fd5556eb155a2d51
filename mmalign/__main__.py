"""``python -m mmalign`` and ``accelerate launch -m mmalign train CONFIG``."""

from mmalign.cli import main

if __name__ == "__main__":
    main()
