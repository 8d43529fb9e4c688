"""``python -m visadapt`` is the ``visadapt`` command."""

from visadapt_command import main

if __name__ == "__main__":
    main()
