"""Tokenizers: encoder, bottleneck, decoder, and the discriminator that plays against them."""
