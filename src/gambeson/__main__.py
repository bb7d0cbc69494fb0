"""``python -m gambeson``."""

from gambeson.cli import main

if __name__ == "__main__":
    main()
