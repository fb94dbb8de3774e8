# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
from .adapter_toast import ToastAdapter
from .transformer_bert import MaskGitBertTransformer2DModel
from .transformer_dit import MaskGitDiTTransformer2DModel
from .transformer_partition import PartitionTransformer2DModel
from .transformer_vit import MaskGitViTTransformer2DModel
from .vq_maskgit import MaskGitVQModel
