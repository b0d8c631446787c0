"""Named YAML files of options, and how files of options are read."""
