"""Reasons for drops, in words, and the step of the way each belongs to, in the order in which pictures meet them."""

from typing import Final

TEXT, PICTURE, KEY, COPY, EVALUATION, LABEL, TAKEN = (
    "with a text that can give a label",
    "readable, with a usable picture",
    "one of each key",
    "without copies",
    "without evaluation pictures",
    "with a synset frequent enough",
    "without what was taken down",
)
STEPS: Final = (TEXT, PICTURE, KEY, COPY, EVALUATION, LABEL, TAKEN)

_TEXT: Final = {
    "no_caption": "no caption and no hashtags",
    "no_hashtags": "a caption without hashtags",
    "no_synset": "no hashtag is a noun that may be a label",
    "denied": "all its nouns are on the deny-list",
    "denied_non_visual": "all its nouns are on the deny-list: not to be seen",
    "denied_sensitive": "all its nouns are on the deny-list: sensitive",
    "forbidden": "all its hashtags are forbidden by the overrides",
    "ambiguous": "all its hashtags have several senses, which the policy leaves out",
    "caption_too_long": "the caption is too long",
    "caption_not_utf8": "the caption is not UTF-8",
    "text_too_long": "language, source, licence or address is too long",
    "too_many_hashtags": "hashtags without end",
    "caption_not_text": "the caption is not a text",
    "field_not_text": "language, source, licence or address is not a text",
    "hashtags_not_text": "the hashtags are not texts",
    "nul_byte": "a text with a zero byte",
    "bad_json": "not a JSON object",
    "bad_csv": "not a record of the table: quotes, or another number of columns",
    "record_too_long": "a record without end",
}
_PICTURE: Final = {
    "missing_image": "no picture",
    "empty_image": "an empty file",
    "unsupported_format": "not a picture of a known format",
    "undecodable": "the picture cannot be decoded",
    "truncated": "the picture ends too early",
    "too_small": "the picture is too small",
    "too_elongated": "the picture is too long for its width",
    "too_many_pixels": "the picture has too many pixels",
    "too_many_scans": "the picture has scans without end",
    "unsupported_pixels": "pixels of a kind that no reader knows",
    "too_many_bytes": "the file is too large",
    "unreadable_file": "the file cannot be read",
    "bad_key": "the name cannot be a key",
    "missing_file": "the file named for it is not there",
    "unsafe_path": "a path that points outside",
    "url_not_allowed": "an address that may not be fetched",
    "failed_to_download": "img2dataset could not fetch it",
    "failed_to_resize": "img2dataset could not read it",
    "failed": "img2dataset has not got it",
    "damaged_file": "the table is damaged there",
    "damaged_tar": "the tar is damaged from here on",
    "truncated_tar": "the tar ends too early",
    "unsafe_name": "a tar member whose name points outside",
    "tar_link": "a tar member that is a link",
    "tar_device": "a tar member that is a device",
    "tar_sparse": "a tar member with holes",
    "tar_unknown_kind": "a tar member of an unknown kind",
    "header_too_long": "a tar member with a header without end",
    "duplicate_member": "a tar member that was there before",
    "killed_worker": "reading it ended the process, again and again",
    "timed_out": "reading it took too long, again and again",
    "out_of_memory": "reading it took too much memory, again and again",
}
_BY_STEP: Final = {
    TEXT: _TEXT,
    PICTURE: _PICTURE,
    KEY: {"duplicate_key": "the key was there before"},
    COPY: {"exact_duplicate": "the same picture as another", "near_duplicate": "nearly the same picture as another"},
    EVALUATION: {"evaluation_image": "a picture of an evaluation set"},
    LABEL: {"below_min_count": "its synsets name too few pictures"},
    TAKEN: {"taken_down": "taken down on request"},
}
REASONS: Final = {code: words for reasons in _BY_STEP.values() for code, words in reasons.items()}
CHANGES: Final = {
    "resized": "made smaller",
    "turned": "turned upright",
    "colours_converted": "colours brought to sRGB",
    "eight_bits": "brought to 8 bits",
    "made_opaque": "transparent parts made white",
    "first_frame": "the first frame of an animation taken",
    "other_format": "stored in another format",
    "profile_ignored": "a damaged colour profile ignored",
}


def step_of(code: str) -> str:
    """A reason that is not known here is one of the picture's: those come from codecs, sources and limits."""
    return next((step for step, reasons in _BY_STEP.items() if code in reasons), PICTURE)
