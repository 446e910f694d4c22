"""Parts of speech of a short English text, by lists and a few rules: enough to choose which words of a question move.

No model and no download. Words that are more than grammar (vdm_priors.words.is_content_word) get one of PARTS, named as
in the universal tag set (Petrov et al., "A universal part-of-speech tagset", LREC 2012). What no list knows is told by
its ending and by the word before it, and is a noun otherwise; so are all words of other languages.
"""

from __future__ import annotations

from collections.abc import Sequence

from vdm_priors.words import Word, is_content_word

RULE = 1  # raise when the same text would get other parts: it is part of the store key
PARTS = ("noun", "verb", "adjective", "adverb", "number")

NUMBERS = frozenset("zero one two three four five six seven eight nine ten eleven twelve".split())
# of place, direction and order: prepositions of direction are counted here, as they say which way something moves
ADVERBS = frozenset(
    """
    left right up down forward forwards backward backwards back away off out ahead together apart around round across
    along through over under into onto toward towards upward upwards downward downwards sideways inward inwards outward
    outwards clockwise anticlockwise counterclockwise counter-clockwise above below behind beside near far first second
    last then next before after again once twice thrice always never still soon later fast slow
    """.split()
)
ADJECTIVES = frozenset(
    """
    red green blue yellow orange purple violet pink brown black white grey gray cyan magenta golden silver dark bright
    big small large little tiny huge tall short long wide narrow thick thin high low heavy light young old new
    quick rapid steady smooth sudden straight curved circular same other different many several few
    more most all both whole main
    """.split()
)
VERBS = frozenset(
    """
    move go come run walk jump hop leap skip turn spin rotate roll slide glide fall drop rise climb fly swim dive float
    drift sink bounce swing sway shake wave nod tilt pan zoom track dolly orbit circle curve bend twist stretch shrink
    grow open close push pull lift lower raise carry throw catch kick hit strike punch pass hold grab pick put place lay
    take give bring leave enter exit reach touch press tap pour cut chop stir mix wipe wash clean fold stop start begin
    end finish pause rest stay stand sit lie kneel crouch dance march drive ride pedal row skate ski surf sail travel
    follow chase approach cross collide crash break split merge join appear vanish disappear repeat happen change do
    make use show play look point face see
    """.split()
)
IRREGULAR = frozenset(
    """
    went gone came ran fell fallen flew flown swam swum rose risen stood sat lay lain threw thrown caught held spun
    swung shook shaken slid struck bent took taken gave given brought grew grown shrank shrunk sank sunk rode ridden
    drove driven broke broken began begun made shown saw seen
    """.split()
)
DETERMINERS = frozenset("a an the this that these those my your his her its our their some any each every no".split())
PREPOSITIONS = frozenset("of for with without by at in on from about".split())  # nouns follow them
SUBJECTS = frozenset("i you he she it we they who to".split())  # verbs follow them


def parts_of_speech(words: Sequence[Word]) -> list[str]:
    """For each word of a text in order, one of PARTS, or "" for grammar."""
    parts: list[str] = []
    for n, word in enumerate(words):
        text = word.text.casefold().replace("\u2019", "'").split("'")[0]
        before = words[n - 1].text.casefold() if n else ""
        parts.append(_part(text, before, parts[-1] if parts else "") if is_content_word(word) else "")
    return parts


def _part(text: str, before: str, part_before: str) -> str:
    """Of a content word; before: the word before it, and part_before that one's part."""
    if text in NUMBERS or text[0].isdigit():
        return "number"
    for part, known in (("adverb", ADVERBS), ("adjective", ADJECTIVES)):
        if text in known:
            return part
    if _is_verb_form(text):
        inflected = text.endswith(("ing", "ed")) or text in IRREGULAR
        named = before in DETERMINERS | PREPOSITIONS or part_before in ("adjective", "number")
        return "noun" if named and not inflected else "verb"
    if text.endswith("ly") and len(text) > 4:
        return "adverb"
    if before in SUBJECTS or text.endswith("ed") and len(text) > 4:
        return "verb"
    return "noun"


def _is_verb_form(text: str) -> bool:
    """Whether it is a listed verb or -s, -ed or -ing of one."""
    stems = [text]
    for ending in ("s", "es", "d", "ed", "ing"):
        if text.endswith(ending):
            stem = text.removesuffix(ending)
            doubled = stem[:-1] if stem[-1:] == stem[-2:-1] else stem  # spinning
            stems += [stem, stem + "e", doubled, stem.removesuffix("i") + "y"]
    return text in IRREGULAR or any(stem in VERBS for stem in stems)
