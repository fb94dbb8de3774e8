# Copyright 2026 The maskgit authors. Licensed under the Apache License, Version 2.0.
from .scheduling_confidence import ConfidenceScheduler
from .scheduling_halton import HaltonScheduler
from .scheduling_self_guided import SelfGuidedScheduler
