"""``python -m visadapt`` is the ``visadapt`` command."""

from visadapt.cli import main

if __name__ == "__main__":
    main()
