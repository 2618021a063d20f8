"""English words that exercises are made with."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


TITLES = _words("Mr. Mrs. Ms. Dr. Prof. St. Capt. Col. Gen. Rev. Sr. Jr. No. vs. etc. e.g. i.e.")
"""Words with a point that ends no sentence."""
PRONOUNS = _words("he she they him")
"""For the one a passage is about. "It" and "them" are mostly for something else."""
POSSESSIVES = _words("his her their")
GIVEN = _list(
    """
    James Mary John Patricia Robert Jennifer Michael Linda William Elizabeth David Barbara Richard Susan Joseph Jessica
    Thomas Sarah Charles Karen Daniel Nancy Matthew Betty Mark Helen Donald Sandra Steven Ashley Andrew Kimberly Kevin
    Emily George Donna Edward Michelle Brian Carol Ronald Amanda Kenneth Dorothy Timothy Melissa Jason Rebecca
    """
)
SURNAMES = _list(
    """
    Smith Johnson Williams Brown Jones Garcia Miller Davis Rodriguez Martinez Hernandez Lopez Wilson Anderson Taylor
    Moore Jackson Martin Lee Perez Thompson White Harris Sanchez Clark Ramirez Lewis Robinson Walker Young Allen King
    Wright Scott Torres Nguyen Hill Flores Green Adams Nelson Baker Hall Rivera Campbell Mitchell Carter Roberts
    """
)
"""Common names, for people of whom nothing is told."""
TO_BE = _words("is was are were has had have lies stands")
"""After a first word that is a name they are likelier than after another."""
CHANGES = (
    r"\b(?:no longer|any ?more|now|today|nowadays|instead|formerly|used to|given up|gave|sold|died|goodbye|replaced)\b"
    r"|\b(?:not|thought to)\b(?=.*\bbut\b)"
)
"""Words of a sentence that says that something changed, as a regular expression."""
COMMON = _words(
    """
    a an the this that these those some any every each all both no not many few more most much one two three
    i me my we us our you your he she they him his her their it its them who whom whose which what where when why how
    and or but nor so yet if than because while although though until since
    in on at of to from by with without for about as into onto over under after before between through during against
    is am are was were be been being has have had do does did will would can could shall should may might must
    there here then now also very just only even still too ever never always often everyone everybody someone somebody
    nobody something nothing everything
    """
)
"""Words that most texts have: what they stand for is not asked, and none of them is a name."""
VAGUE = _words("person people thing things something object item word name noun type kind form piece one")
"""Kinds that say nothing."""
