"""Learning in the stream: a pre-trained model that goes on learning from what it reads, and what it learned as files."""
