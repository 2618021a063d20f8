"""Knowledge: documents, invented or real, and questions about them of which every answer is known."""

from nestling.tasks.knowledge.questions import KINDS, NOT_TOLD, KnowledgeQuestion, ask_world
from nestling.tasks.knowledge.sources import Material, dictionary_material, name_material, story_material
from nestling.tasks.knowledge.world import ATTRIBUTES, Fact, World, make_world

__all__ = [
    "ATTRIBUTES",
    "KINDS",
    "NOT_TOLD",
    "Fact",
    "KnowledgeQuestion",
    "Material",
    "World",
    "ask_world",
    "dictionary_material",
    "make_world",
    "name_material",
    "story_material",
]
