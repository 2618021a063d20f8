"""Learning in the stream: a pre-trained model goes on learning from what it reads, and what it learned is a file."""

from nestling.continual.guards import LearningDivergedError, LearningWarning
from nestling.continual.learner import Learner
from nestling.continual.memory import Memory
from nestling.continual.observation import Observation
from nestling.continual.options import Gate, Level, Options, Rehearsal, Replay, UpdateLimit
from nestling.continual.store import MemoryStore, load_memory

__all__ = [
    "Gate",
    "Learner",
    "LearningDivergedError",
    "LearningWarning",
    "Level",
    "Memory",
    "MemoryStore",
    "Observation",
    "Options",
    "Rehearsal",
    "Replay",
    "UpdateLimit",
    "load_memory",
]
