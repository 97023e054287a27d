"""Offline backend: the vocabulary's phrases, rules for how chest reports say them, and NegEx.

A report is cut into sentences. Mentions of findings are found by spaCy's phrase matcher (names and
synonyms) and by `RULES` (what is said in pieces: "the size of the heart has increased"). Whether a
mention is negated, gone, only possible, history or a relative's is decided by negspacy, an
implementation of NegEx for spaCy, once for each of `CONTEXTS` with that context's own terms. What
is left is present.

No model is downloaded: the pipeline is `spacy.blank("en")` and those terms.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from brgsa_jax.config import UserError
from brgsa_jax.summarize import vocabulary
from brgsa_jax.summarize.validate import InvalidAnswer
from brgsa_jax.summarize.vocabulary import closure, fold

# Raised with every change of a rule or term: it is in the name that every summary carries.
VERSION = 1
_KNOWN_SENTENCES = 200_000

# Words between the parts of a mention; none of them denies it.
_WORD = r"(?!not |no |without |nor |normal |natural )[\w%]+ (?:, )?"
_GAPS = {"__": rf"(?:{_WORD}){{0,16}}?", "_": rf"(?:{_WORD}){{0,7}}?"}


class Rule(NamedTuple):
    """A way to say a finding.

    Attributes:
        finding: canonical name.
        stems: the rule is tried on sentences that hold one of these.
        pattern: regular expression on the folded sentence, what it matches is the mention.
        unless: a sentence that this matches is about something else.
    """

    finding: str
    stems: tuple[str, ...]
    pattern: re.Pattern[str]
    unless: re.Pattern[str] | None


def _rule(finding: str, stems: str, *patterns: str, unless: str = "") -> Rule:
    """Makes a rule; before a space, `_` stands for up to 7 words between and `__` for up to 16."""
    whole = "|".join(patterns)
    for mark, gap in _GAPS.items():
        whole, unless = (re.sub(rf"(?<=[ ()]){mark} ", lambda _: gap, text)  # noqa: B023
                         for text in (whole, unless))
    return Rule(finding, tuple(stems.split()), re.compile(rf"\b(?:{whole})"),
                re.compile(unless) if unless else None)


_MORE = (r"(?:increase[sd]?|increasing|enlarge\w*|larger?|wider|dilat\w+)\b")
_VESSEL = (r"(?:aort\w+|arcus|iliac|subclavian|carotid|supraaortic|brachiocephalic|innominate"
           r"|(?<!coronary )(?:vascular|vessels?|arterial|arteries)|mesenteric)\b")
_CORONARY = r"(?:coronar\w+|lad|lcx|cx|rca|left anterior descending|circumflex)\b"
_PLAQUE = r"(?:plaques?|atherom\w*|atherosclero\w+|(?:wall |mural )?calcifi\w+)\b"
_NOT_ARTERY = (r"valv\w+|lymph\w*|laps?\b|nodul\w+|pleura\w*|pericard\w+|bronch\w+|trache\w+"
               r"|granulom\w*|liver|splee?n\w*|kidney|renal|mass\b|thyroid|breast")
_LUNG = r"lungs?|lob(?:e|es|ar)|segments?|parenchym\w+|lingula\w*|fissure|apical|apex|hemithora\w+"
_ABDOMEN = (r"liver|hepatic|splee?n\w*|kidneys?|renal|pancrea\w*|gallbladder|adrenal|abdom\w+"
            r"|mesenter\w*|periton\w*|omentum|omental|bowel|intestin\w*|colon\w*|stomach")
_ELSEWHERE = (rf"{_ABDOMEN}|thyroid|schmorl\w*|vertebra\w*|breasts?|bones?|skin|subcutaneous"
              r"|axilla\w*|mediastin\w+|retroareolar|muscles?|sternum|chest wall|thoracic wall")
_NOT_LUNG = rf"^(?!.*\b(?:{_LUNG})\b).*\b(?:{_ELSEWHERE})\b"

RULES: tuple[Rule, ...] = (
    _rule("Medical material",
          "cathet stent pacemak cannula tube sutur clip prosthe port metal sternotom valve "
          "medical electrod implant screw plate wire drain fixat material staple defibrill",
          r"medical (?:materials?|devices?)", r"catheters?\b", r"stents?\b", r"pacemakers?\b",
          r"\w*cannulas?\b", r"sutures?\b", r"defibrillators?\b", r"clips?\b", r"prosthe\w+",
          r"staples\b",
          r"(?:nasogastric|endotracheal|tracheostomy|chest|thora\w+|drain\w*|feeding|intubation"
          r"|orogastric|enteral|gastrostomy|jejunostomy) tubes?\b", r"sternotomy", r"electrodes?\b",
          r"port (?:chamber|reservoir)", r"(?:infusion|chest wall|chest) ports?\b",
          r"metal\w* (?:densit\w+|artifacts?|materials?|objects?)",
          r"valve (?:replacement|prosthes[ie]s)", r"(?:peg|surgical|operation|fixation) materials?",
          r"(?:internal |external )?fixat(?:ors?|ion)\b",
          r"(?:metal\w*|orthop\w+|surgical|breast|silicone?|spinal) (?:implants?|plates?|screws?"
          r"|wires?|rods?)", r"(?:chest|thoracic|thorax|surgical|pleural) drains?\b",
          unless=r"suture (?:compression|lines?)|stent\w* _ bile|bile ducts? __ stent"),
    _rule("Cardiomegaly", "cardiom heart cardiac cardiothoracic ctr ventric atri",
          r"cardiome\w+", rf"heart (?:size|dimension|chamber|cavit)?\w* _ {_MORE}",
          rf"(?:cardiothoracic (?:index|ratio)|ctr) _ {_MORE}",
          rf"{_MORE} (?:in|of) (?:the )?(?:size of the )?(?:heart|cardiothoracic|ctr|cardiac)",
          rf"{_MORE} (?:heart|cardiac|cardiothoracic)",
          rf"(?:atrium|atria|ventricles?|cardiac (?:chambers?|spaces?|cavities)) _ {_MORE}"),
    _rule("Pericardial effusion", "pericard",
          r"pericardi\w+ _ (?:effusions?|fluid)", r"(?:effusions?|fluid) __ pericardi\w+",
          r"hemopericardium"),
    _rule("Hiatal hernia", "hern",
          r"(?:hiat\w+|slid\w+|silid\w+|paraesophageal|mixed|diaphragm\w+)(?: \w+){0,3} herni\w+",
          r"herni\w+ _ (?:hiat|esophag|stomach|gastric|fundus)\w*",
          r"(?:stomach|gastric|fundus) _ herni\w+"),
    _rule("Lymphadenopathy", "lymph lap",
          r"lymph ?nodes?\b(?! stations?)", r"laps?\b", r"lymph ?adenopath\w*",
          r"lymph ?adenomegal\w*",
          unless=r"(?:intrapulmonary|intraparenchymal|subpleural|perifissural)(?: \w+)? lymph"),
    _rule("Emphysema", "emphysem bull bleb",
          r"emphysem\w*", r"bullae?\b", r"bullous", r"blebs?\b",
          unless=r"(?:subcutaneous|mediastinal|soft tissue) emphysem|emphysem\w* _ (?:subcutan"
                 r"|axilla|pector|muscle|mediastin)"),
    _rule("Atelectasis", "atelect collaps",
          r"(?<!fibro )atelect\w+", r"(?:lobe|lobar|lung|total|segment\w*|lungs) collapsed?",
          r"collapsed lung", r"collapse (?:of|in) _ (?:lungs?|lobes?)"),
    _rule("Lung nodule", "nodul",
          r"nodules?\b", r"micro ?nodul\w+", r"nodular (?:lesions?|formations?|opacit\w+|patterns?"
          r"|infiltrates?|appearances?)", unless=rf"{_NOT_LUNG}|schmorl|thyroid|accessory spleen"),
    _rule("Ground glass opacity", "glass",
          r"(?:ground|frosted) ?glass\w*(?: (?:like|density|opacity|attenuation|nodul\w+))*"),
    _rule("Lung opacity", "opaci crazy",
          r"opacit(?:y|ies)\b", r"opacifi\w*", r"crazy paving"),
    _rule("Lung opacity", "densit",
          r"densit(?:y|ies) increase[sd]?", r"increase[sd]? (?:in |of )?(?:the )?densit(?:y|ies)",
          r"increased _ densit(?:y|ies)", r"dependent densit(?:y|ies)",
          unless=rf"{_NOT_LUNG}|{_ABDOMEN}|fat|fatty|sequel|fibro|pleuro ?par|pleural|vertebr"
                 r"|breast|sutur|metal"),
    _rule("Pulmonary fibrotic sequela", "sequel fibro scar pleuropar pleuro parenchymal",
          r"sequel\w*", r"fibro(?! ?sarcom| ?adenom| ?glandular| ?myom| ?id)\w*",
          r"scar(?:s|ring)?\b", r"pleuro ?par[ea]n\w+", r"parenchymal bands?", unless=_NOT_LUNG),
    _rule("Pleural effusion", "effusion fluid hydro hemothorax",
          r"pleural _ (?:effusions?|fluid)", r"hydro(?:pneumo)?thora\w+", r"hem[ao]thora\w+",
          r"(?:effusions?|fluid) __ (?:pleura\w*|hemithora\w+)"),
    _rule("Pleural effusion", "effusion",
          r"effusions?\b", unless=rf"pericard|{_ABDOMEN}|joint|knee|synov|shoulder"),
    _rule("Mosaic attenuation pattern", "mosaic", r"mosaic\w*"),
    _rule("Peribronchial thickening", "bronch",
          r"peri ?bronch\w+ _ thick\w+", r"thick\w+ _ peri ?bronch\w+"),
    _rule("Bronchial thickening", "bronch",
          r"bronch\w+ (?:walls? _ )?thick\w+", r"thick\w+ _ bronch\w+ walls?"),
    _rule("Consolidation", "consol", r"consolidat\w+"),
    _rule("Bronchiectasis", "bronch ectas",
          r"bronch\w*ecta\w+", r"bronch\w+ ectas\w+", r"bronch\w+ _ (?:dilat|ectat)\w+",
          r"(?:dilat|ectat)\w+ _ bronch(?:us|i|ial|ioles?)\b"),
    _rule("Interlobular septal thickening", "sept",
          r"(?:inter ?lob\w+ |inter)?sept(?:al|um|a)\b _ (?:thick|clarif|promin)\w+",
          r"(?:thick|clarif|promin)\w+ _ (?:interlob\w+ )?sept(?:al|um|a)\b",
          unless=r"interventric|interatrial|nasal"),
    _rule("Arterial wall calcification", "plaque athero calcif",
          rf"{_PLAQUE} __ {_VESSEL}", rf"{_VESSEL} _ {_PLAQUE}", unless=_NOT_ARTERY),
    _rule("Coronary artery wall calcification", "coronar lad lcx rca descending circumflex",
          rf"{_PLAQUE} __ {_CORONARY}", rf"{_CORONARY} _ {_PLAQUE}"),
    _rule("Atherosclerosis", "athero", r"atherom\w*", r"atherosclero\w+",
          unless=rf"^(?!.*\b{_VESSEL}).*\b{_CORONARY}"),
    # The rest of the vocabulary where its phrases, which the matcher finds, are not all.
    _rule("Calcification", "calcif", r"calcific\w*", r"calcified",
          unless=rf"{_VESSEL}|{_CORONARY}|pleura|pericard|plaque"),
    _rule("Pericardial calcification", "pericard",
          r"calcif\w+ __ pericardi\w+", r"pericardi\w+ _ calcif\w+"),
    _rule("Pleural calcification", "pleura", r"calcif\w+ _ pleura\w*", r"pleura\w* _ calcif\w+"),
    _rule("Pleural thickening", "pleura", r"pleura\w* _ (?:thick\w+|plaques?)",
          r"(?:thick\w+|plaques?) _ pleura\w*"),
    _rule("Lung mass", "mass", r"mass(?:es)?\b(?! effects?| like)",
          unless=rf"^(?!.*\b(?:lungs?|lob(?:e|es|ar)|lingula\w*|hilar|pulmonary)\b)|{_ABDOMEN}"
                 r"|breast|thyroid|mediastin|pleural mass|chest wall"),
    _rule("Tuberculosis", "tbc tb tubercul",
          r"(?<!past )(?<!previous )(?<!old )(?:tbc?|tubercul\w+)\b(?! sequel)"),
    _rule("Osteophyte", "osteophyt", r"osteophyt\w+"),
    _rule("Rib fracture", "rib", r"fractur\w+ __ ribs?\b", r"(?:ribs?|costal) _ fractur\w+"),
    _rule("Vertebral compression fracture", "vertebra compression",
          r"compression (?:in _ vertebra\w* )?fractur\w+",
          r"vertebra\w* _ (?:compression|collaps\w+)",
          r"(?:height loss|loss (?:of|in) height|loss of _ height) __ vertebra\w*",
          r"vertebra\w* __ (?:height loss|loss (?:of|in) height)"),
    _rule("Vertebral degeneration", "degenerat",
          r"degenerat\w+ __ (?:vertebra\w*|spine|discs?|spinal)",
          r"(?:vertebra\w*|spine|discs?) _ degenerat\w+"),
    _rule("Thyroid nodule", "thyroid", r"thyroid __ nodul\w+", r"nodul\w+ __ thyroid",
          r"nodular goiter", r"multinodular goiter"),
    _rule("Fatty liver", "liver steat hepato",
          r"(?:hepato ?|hepatic )?steato?s\w*", r"hepatostea\w+",
          r"liver __ (?:fat|fatty|adiposity|lubricat\w+)\b", r"(?:fatty|adiposity) _ liver"),
    _rule("Hepatomegaly", "liver hepatomegal", r"hepatomegal\w+",
          rf"liver (?:is |was |sizes? |dimensions? |length |vertical |cc )_ {_MORE}",
          rf"(?:size|dimension|length)s? of the liver _ {_MORE}", rf"{_MORE} in _ liver size",
          unless="densit|lesion|lobe|mass|cyst"),
    _rule("Splenomegaly", "spleen splenomegal", r"splenomegal\w+",
          rf"spleen (?:is |was |sizes? |dimensions? |length |vertical |cc )_ {_MORE}",
          rf"(?:size|dimension|length)s? of the spleen _ {_MORE}", rf"{_MORE} in _ spleen size",
          unless="densit|lesion|mass|cyst|accessory"),
    _rule("Liver lesion", "liver hepatic",
          r"(?:lesions?|cysts?|mass(?:es)?|nodules?|hemangiomas?) __ (?:liver|hepatic)",
          r"(?:liver|hepatic) __ (?:lesions?|cysts?|mass(?:es)?|nodules?|hemangiomas?)",
          unless="kidney|renal|adrenal|splee|pancrea|lung"),
    _rule("Renal cyst", "cyst", r"cysts? __ (?:kidneys?|renal)", r"(?:kidneys?|renal) __ cysts?",
          r"cortical cysts?", unless="liver|hepatic|splee|adrenal|ovar"),
    _rule("Kidney stone", "calcul stone",
          r"(?:calcul(?:us|i|uses)|stones?) __ (?:kidneys?|renal|calyx|calyce\w*)",
          r"(?:kidneys?|renal|calyx|calyce\w*) __ (?:calcul(?:us|i|uses)|stones?)"),
    _rule("Kidney atrophy", "atroph", r"atroph\w+ __ kidneys?", r"kidneys? _ atroph\w+"),
    _rule("Gallstone", "calcul stone lithiasis", r"gall ?stones?\b",
          r"(?:calcul(?:us|i|uses)|stones?) __ gall ?bladder", r"cholelithiasis",
          r"gall ?bladder __ (?:calcul(?:us|i|uses)|stones?)"),
    _rule("Adrenal hyperplasia", "adrenal", r"adrenal _ (?:thick\w+|hyperplas\w+)",
          r"(?:thick\w+|hyperplas\w+) _ adrenal"),
)


class Context(NamedTuple):
    """What makes a mention no finding: NegEx terms before it, after it, and not in truth.

    Attributes:
        name: of the flag that negspacy sets.
        before, after: terms that reach a mention on their other side, up to an end of clause.
        pseudo: phrases that hold such a term and mean something else.
    """

    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    pseudo: tuple[str, ...] = ()


CONTEXTS = (
    Context("negated",
            ("no", "not any", "without", "absence of", "negative for", "free of", "lack of",
             "rule out", "rules out", "neither", "nor", "not show", "not contain", "not have",
             "never", "not include", "not compatible with", "not be compatible with",
             "not consistent with", "not typical", "atypical for", "atypical in terms of",
             "atypical appearance"),
            ("not observed", "not detected", "not seen", "not found", "not present", "not visible",
             "not distinguished", "not monitored", "not noted", "not identified", "not selected",
             "not available", "not evident", "not encountered", "not demonstrated",
             "not revealed", "not any", "not been", "not clearly", "not definitely",
             *(f"not be {seen}" for seen in ("observed", "seen", "detected", "distinguished")),
             "none", "absent", "ruled out", "was excluded", "were excluded"),
            ("no difference", "no significant difference", "no change", "no significant change",
             "no increase", "no significant increase", "no interval change", "no regression",
             "no significant regression", "no contrast", "without contrast", "no longer",
             "without mass effect", "not only",
             *(f"not {seen} {when}" for seen in ("observed", "present", "seen", "detected")
               for when in ("in the previous", "in previous", "in the prior", "previously")))),
    Context("gone",
            ("resolution of", "disappearance of", "complete regression of"),
            ("disappeared", "resolved", "completely regressed", "complete regression",
             "total regression", "been lost", "no longer")),
    Context("uncertain",
            ("in terms of", "for exclusion of", "to exclude", "differential diagnosis",
             "may be negative", "evaluated for", "possible", "rather than"),
            ("cannot be excluded", "could not be excluded", "should be excluded",
             "not be excluded", "not be ruled out", "differential diagnosis", "unlikely")),
    Context("history", ("history of", "medical history", "anamnesis"), ()),
    Context("family", ("family history", "familial", "mother", "father", "sibling", "siblings"),
            ("in the family",)),
)

# Where one statement ends and the next begins inside a sentence. A verb of seeing belongs to what
# stands before it, so that "X is observed, Y was not detected" denies Y alone.
CLAUSE_ENDS = (
    "but", "however", "although", "though", "while", "except", "apart from", "aside from",
    "nevertheless", "yet", "and there is", "and there are", ", there is", ", there are",
    *(f"{verb} {seen}" for verb in ("is", "are", "was", "were")
      for seen in ("observed", "seen", "present", "detected", "monitored", "noted")),
    "draws attention", "draw attention",
    ", a few", ", minimal", ", millimetric", ", several", ", mild", "and a few", "and minimal",
    "and mild", ";")

# A stop followed by a space (but not "T12. vertebra"), a question that a capital follows, a line's
# end, a quotation mark or bullet: impressions come as lists.
_SENTENCE = re.compile(
    r"[.!;]+(?=\s|$|[\"“”•·])(?<!\d\.(?=\s[a-z]))|\?(?=\s+[A-Z\"“])|[\n\r\"“”•·*]+")
# NegEx takes the square of a sentence's length: text without stops is cut.
_PIECE = re.compile(r".{1,1000}(?!\S)|.{1,1000}", re.S)
_NORMAL = re.compile(r"\b(?:normal\w*|natural|unremarkable|clear|no abnormal\w*|no patholog\w*)\b")


class _Read(NamedTuple):
    """What a sentence says: its findings, and whether it speaks of findings or normality at all."""

    findings: frozenset[str]
    understood: bool


class Lexicon:
    """The backend `lexicon`.

    Attributes:
        name: "lexicon/VERSION".
    """

    name = f"lexicon/{VERSION}"

    def __init__(self) -> None:
        """Builds the pipeline.

        Raises:
            UserError: spaCy or negspacy is not installed.
        """
        self._nlp, self._matcher, self._longest = _pipeline()
        self._terms = {context.name: re.compile("|".join(map(fold, context.before + context.after)))
                       for context in CONTEXTS}
        self._words = frozenset(max(phrase.split(), key=len) for phrase in vocabulary.phrases())
        self._known: dict[str, _Read] = {}

    def summarize(self, reports: Sequence[str]
                  ) -> Iterator[tuple[int, tuple[str, ...] | InvalidAnswer]]:
        """Yields (position, findings or why there are none) of every report, in their order."""
        for position, report in enumerate(reports):
            try:
                yield position, self.findings(report)
            except InvalidAnswer as answer:
                yield position, answer

    def findings(self, report: str) -> tuple[str, ...]:
        """Returns the canonical findings of one report, parents included.

        Raises:
            InvalidAnswer: no sentence names a finding, be it to deny it, or calls something
                normal: the report is not English or not of a chest.
        """
        found: set[str] = set()
        understood = False
        for sentence in sentences(report):
            if (read := self._known.get(sentence)) is None:
                if len(self._known) >= _KNOWN_SENTENCES:
                    self._known.clear()
                read = self._known[sentence] = self._read(fold(sentence))
            found |= read.findings
            understood |= read.understood
        if not understood:
            raise InvalidAnswer("no sentence speaks of a finding of the vocabulary; is it an "
                                "English chest report?")
        return closure(found)

    def _read(self, sentence: str) -> _Read:
        """Reads a folded sentence."""
        mentions = list(self._mentions(sentence))
        return _Read(frozenset(name for name, present in mentions if present),
                     bool(mentions or _NORMAL.search(sentence)))

    def _mentions(self, sentence: str) -> Iterator[tuple[str, bool]]:
        """Yields (finding, whether it is said to be present) of every mention."""
        rules = [rule for rule in RULES if any(stem in sentence for stem in rule.stems)]
        if not rules and self._words.isdisjoint(sentence.split(" ")):
            return
        doc = self._nlp.make_doc(sentence)
        mentions = [(span.label_, span.start, span.end)
                    for span in self._longest(self._matcher(doc, as_spans=True))]
        for rule in rules:
            if rule.unless and rule.unless.search(sentence):
                continue
            for match in rule.pattern.finditer(sentence):
                span = doc.char_span(*match.span(), alignment_mode="expand")
                mentions.append((rule.finding, span.start, span.end))
        # A mention in pieces may reach over an end of clause, where NegEx leaves it alone: its
        # first and its last word are judged.
        ends = [(name, end < len(doc) and doc[end].text == "?",
                 [doc[start:start + 1], doc[end - 1:end]]) for name, start, end in mentions]
        doc.spans[_SPANS] = [span for _, _, spans in ends for span in spans]
        flags = []
        for name, pipe in self._nlp.pipeline:
            # Most sentences hold no term of a context, and looking is faster than its matcher.
            if self._terms[name].search(sentence):
                doc = pipe(doc)
                flags.append(name)
        for name, asked, spans in ends:
            yield name, not asked and not any(
                span._.get(flag) for span in spans for flag in flags)


_SPANS = "findings"


def sentences(report: str) -> Iterator[str]:
    """Yields the sentences of a report, stripped, without their marks."""
    for part in _SENTENCE.split(report):
        for piece in _PIECE.findall(part):
            if piece := piece.strip():
                yield piece


class _Tokenizer:
    """A folded text as one sentence, its tokens what stands between spaces."""

    def __init__(self, vocab: Any):
        from spacy.tokens import Doc

        self._make = functools.partial(Doc, vocab)

    def __call__(self, text: str) -> Any:
        words = text.split(" ")
        return self._make(words=words, sent_starts=[True] + [False] * (len(words) - 1))

    def pipe(self, texts: Sequence[str], **_: Any) -> Iterator[Any]:
        return map(self, texts)


def _pipeline() -> tuple[Any, Any, Any]:
    try:
        import spacy
        from negspacy.negation import Negex  # noqa: F401  registers "negex"
        from spacy.matcher import PhraseMatcher
        from spacy.util import filter_spans
    except ImportError as error:
        raise UserError("the lexicon backend needs spaCy and negspacy; run pip install "
                        "'brgsa-jax[summarize]'") from error
    nlp = spacy.blank("en")
    nlp.tokenizer = _Tokenizer(nlp.vocab)
    for context in CONTEXTS:
        nlp.add_pipe("negex", name=context.name, config={
            "extension_name": context.name, "span_keys": [_SPANS],
            "neg_termset": {"pseudo_negations": list(map(fold, context.pseudo)),
                            "preceding_negations": list(map(fold, context.before)),
                            "following_negations": list(map(fold, context.after)),
                            "termination": list(map(fold, CLAUSE_ENDS))}})
    matcher = PhraseMatcher(nlp.vocab)
    ruled = {rule.finding for rule in RULES}
    for phrase, name in vocabulary.phrases().items():
        if name not in ruled:
            matcher.add(name, [nlp.make_doc(phrase)])
    return nlp, matcher, filter_spans
