"""Web page and HTTP server of a detector. PyTorch is imported only for a detector that needs it."""
