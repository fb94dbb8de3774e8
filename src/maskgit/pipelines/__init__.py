from .pipeline_maskgit import MaskGitPipeline
