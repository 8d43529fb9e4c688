"""Tasks written out: merged into plain weights, or exported as programs."""
