"""Bounds on the memory and time that files from outside may take, far above what real datasets need."""

NAME_BYTES = 4096
"""Bytes of the name of a tar's member, as of a path on Linux."""
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
CLASS_LIST_BYTES = 2**28
"""Bytes of the class list of a checkpoint or an exported model."""
RECORD_BYTES = 2**30
"""Bytes of a record of a run, such as the manifest of a checkpoint: about 150 for each fragment, of which each rank
writes some hundreds."""
LISTING_BYTES = 2**28
"""Bytes of the page on which a web server lists a folder."""
