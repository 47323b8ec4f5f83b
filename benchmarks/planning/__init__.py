"""What others published: speeds of training and decoding, each with hardware, layout and source."""
