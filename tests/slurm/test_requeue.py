"""A real two-node Slurm: submitted, killed from outside, queued again by its own script, finished, proved."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
