"""Bounds on the memory and time that files from outside may take, far above what real datasets need."""

NAME_BYTES = 4096
"""Bytes of the name of a tar's member, as of a path on Linux."""
HEADER_BYTES = 2**20
"""Bytes of all pax records of a tar's member."""
MEMBERS = 2**22
"""Members of a shard; each takes about 250 bytes while it is opened."""
LABELS_PER_SAMPLE = 4096
"""Labels of one sample; all samples get as many columns as the one with most has."""
SCANS = 100
"""Scans of a JPEG. Encoders write about ten; each takes as long as decoding the whole image."""
IMAGE_BYTES = 2**28
"""Bytes of an encoded image."""
LABEL_BYTES = 2**24
"""Bytes of the label of a sample."""
RECORD_BYTES = 2**30
"""Bytes of a record of a run, such as the manifest of a checkpoint: about 150 for each fragment, of which each rank
writes some hundreds."""
LISTING_BYTES = 2**28
"""Bytes of the page on which a web server lists a folder."""
YAML_BYTES = 2**22
"""Bytes of a YAML file: a recipe or a label map; that of 22,000 classes has two million."""
YAML_VALUES = 200_000
"""Mappings, lists and scalars of a YAML file with all aliases expanded; label maps have tens of thousands."""
CLASS_LIST_BYTES = 2**26
"""Bytes of a class list, also of that of a checkpoint or an exported model."""
LABEL_FILE_BYTES = 2**31
"""Bytes of a list of the labels of images; that of a hundred million images."""
INDEX_BYTES = 2**30
"""Bytes of an `index.json`, of which each shard takes about 200 and each class its name."""
LABELS_BYTES = 2**32
"""Bytes of a `labels.npy`, four for each label."""
