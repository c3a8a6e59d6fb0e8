"""The text: corpora and their normal form, tokenizers, and batches."""
