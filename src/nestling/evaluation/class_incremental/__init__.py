"""Learning the classes of a text one task after another: the protocol, what classifies, and memories of classes."""
