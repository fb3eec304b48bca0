"""``python -m fastloss``, which is also how torchrun starts it: ``torchrun … -m fastloss train …``."""

from .cli import main

if __name__ == "__main__":
    main()
