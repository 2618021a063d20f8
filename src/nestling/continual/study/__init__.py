"""Forgetting a document exactly."""
