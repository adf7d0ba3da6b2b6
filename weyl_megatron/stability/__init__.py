"""What people watch while a Transformer trains: the paper's terms, energy concentration, entropy, rank, sharpness."""
