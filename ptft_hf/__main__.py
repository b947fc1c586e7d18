"""``python -m ptft_hf`` is ``ptft``, for launchers such as torchrun."""

from ptft_hf.cli import main

if __name__ == "__main__":
    main()
