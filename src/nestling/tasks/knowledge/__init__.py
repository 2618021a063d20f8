"""Knowledge: invented worlds told in documents, and questions about them of which every answer is known."""

from nestling.tasks.knowledge.questions import KINDS, NOT_TOLD, KnowledgeQuestion, ask_world
from nestling.tasks.knowledge.world import ATTRIBUTES, Fact, World, make_world

__all__ = ["ATTRIBUTES", "KINDS", "NOT_TOLD", "Fact", "KnowledgeQuestion", "World", "ask_world", "make_world"]
