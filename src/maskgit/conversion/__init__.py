# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
"""
Published checkpoints to models of this package. One file per family turns a state dict into a config and a state dict;
`checkpoints.py` reads files and checks tensors for all of them, `folders.py` writes and verifies the result.
"""

from .checkpoints import ConversionError, Converted, read_weights
from .halton import convert_halton_transformer
from .llamagen import convert_llamagen_tokenizer
from .maskgit_v1 import convert_v1_transformer
from .taming import convert_taming_tokenizer
