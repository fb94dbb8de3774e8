# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
from .pipeline_maskgit import MaskGitPipeline
from .pipeline_maskgit_inpaint import MaskGitInpaintPipeline
