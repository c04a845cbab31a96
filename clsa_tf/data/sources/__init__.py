"""Where images come from: folders, tensorflow-datasets, record files."""
