"""What is asked: documents and questions about them, with references. Knows no policy and no model."""
