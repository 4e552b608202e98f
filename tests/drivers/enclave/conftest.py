"""What enclaves load lazily is loaded before tests count mappings and descriptors."""

from __future__ import annotations

import numpy
from cryptography.hazmat.primitives.ciphers import aead

from prefault.device import opening
from prefault.device.process import launching, serving
from prefault.device.server import event_loop

LOADED = (aead, numpy, launching, opening, event_loop, serving)
