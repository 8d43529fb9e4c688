"""Speed and memory of visadapt, full fine-tuning, the plain backbone and other libraries: ``python -m benchmarks``."""
