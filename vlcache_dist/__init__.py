"""Vision-language serving in which an image is paid for once."""
