"""Named YAML configurations."""
