"""What visadapt costs beside full fine-tuning, the plain backbone and the peers: ``python -m benchmarks``."""
