"""The operations that models are made of: each a plain reference and a fast form of it."""
