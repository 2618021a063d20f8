"""Learning in the stream: a pre-trained model goes on learning from what it reads, and what it learned is a file."""

from nestling.continual.learner.guards import LearningDivergedError, LearningWarning
from nestling.continual.learner.learner import Learner
from nestling.continual.learner.observation import Observation
from nestling.continual.learner.options import Gate, Level, Options, Rehearsal, Replay, UpdateLimit
from nestling.continual.store.memory import Memory
from nestling.continual.store.store import MemoryStore, load_memory

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
