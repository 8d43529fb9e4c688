"""Architectures whose blocks are recognised by structure, one file each."""
