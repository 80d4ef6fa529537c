"""A task head of our own on any backbone of transformers (`trainable.head`). Nothing heavy is imported here."""
