"""Drafts from the text itself: what followed the same tokens earlier in a request, or in a store of text. On rank 0's
host alone, and free of torch."""
