"""`make demo`: train Hope beside a Transformer++, read an unseen text, save what it remembers, load it elsewhere."""
