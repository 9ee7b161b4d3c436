"""The split of the data: by image, decided once and for ever by a hash.

Every stage that asks "is this held out?" asks here: the generator that trains the demo VLM,
the capture that writes the split into the store, and the evaluation that prints figures.
"""

import hashlib
from typing import Literal

Split = Literal["train", "val", "test"]


def split_of(identity: bytes) -> Split:
    """The split of one image: sha256(identity) mod 16, where 0 and 1 are test and 2 is val.

    `identity` is the image file's bytes; for the bundled `shapes` data the layout string
    (so that two renderings of one layout never straddle the split); without an image the prompt.
    """
    bucket = hashlib.sha256(identity).digest()[-1] % 16
    if bucket < 2:
        return "test"
    return "val" if bucket == 2 else "train"
