"""Small trees in the layouts of the real corpora: real WAV files and label files, and what else lies around there."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile
from tiny_models import clip

RATE = 16_000
ESD_NAMES = ("Neutral", "Angry", "Happy", "Sad", "Surprise")


SHORT_S = 0.05


def write_wav(path: Path, *, duration_s: float = SHORT_S) -> None:
    """A clip that is the same for the same name and another for another one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, clip(duration_s, seed=zlib.crc32(path.name.encode())), RATE)


def write_text(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


# --- IEMOCAP ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One utterance of IEMOCAP; the triple is valence, activation, dominance, 1 to 5."""

    name: str
    emotion: str = "neu"
    valence: float = 2.5
    activation: float = 3.0
    dominance: float = 3.5
    text: str | None = "Excuse me."
    audio: bool = True

    @property
    def dialog(self) -> str:
        return self.name.rsplit("_", 1)[0]

    @property
    def session(self) -> Path:
        return Path(f"Session{int(self.name[3:5])}")

    @property
    def line(self) -> str:
        triple = f"[{self.valence:.4f}, {self.activation:.4f}, {self.dominance:.4f}]"
        return f"[6.2901 - 8.2357]\t{self.name}\t{self.emotion}\t{triple}"


IEMOCAP_TURNS = (
    Turn("Ses01F_impro01_F000", "neu"),
    Turn("Ses01F_impro01_M000", "ang", 1.5, 4.0, 4.5, "No!"),
    Turn("Ses02M_script01_1_F003", "exc", 4.0, 4.5, 3.0, "I got it."),
    Turn("Ses03F_impro02_M010", "sad", 2.0, 1.5, 2.0, "She left."),
    Turn("Ses04M_impro05_M001", "hap", 4.5, 3.0, 3.0, "How nice."),
    Turn("Ses05F_impro03_F007", "sur", 3.5, 4.0, 3.0, "Really?"),
    Turn("Ses05F_script02_2_MXX0", "fru", 2.0, 3.5, 3.0, "Again."),
    Turn("Ses05M_impro01_M002", "xxx", 3.0, 3.0, 3.0, "Well."),
    Turn("Ses05M_impro01_F002", "hap", 5.0, 1.0, 1.0, "Yes."),
)


def write_iemocap(
    root: Path, turns: Iterable[Turn] = IEMOCAP_TURNS, *, encoding: str = "utf-8", duration_s: float = SHORT_S
) -> Path:
    """The release's layout, with raters' folders, macOS's files and a dialog's audio beside what counts."""
    for number in range(1, 6):
        (root / f"Session{number}" / "dialog" / "EmoEvaluation").mkdir(parents=True, exist_ok=True)
    by_dialog: dict[str, list[Turn]] = {}
    for turn in turns:
        by_dialog.setdefault(turn.dialog, []).append(turn)
    for dialog, members in by_dialog.items():
        session = root / members[0].session
        raters = "C-E2:\tNeutral state; Anger; Other;\t()\nC-F1:\tFear;\t(odd)\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
        labels = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        labels += "".join(f"{turn.line}\n{raters}" for turn in members)
        write_text(session / "dialog" / "EmoEvaluation" / f"{dialog}.txt", labels)
        write_text(session / "dialog" / "EmoEvaluation" / f"._{dialog}.txt", "\x00\x05\x16\x07 \xb0", "latin-1")
        for folder in ("Attribute", "Categorical", "Self-evaluation"):
            rated = session / "dialog" / "EmoEvaluation" / folder / f"{dialog}_e1.txt"
            write_text(rated, f"{members[0].name} :Happiness; ()\n{members[0].line}\n")
        spoken = "".join(f"{t.name} [006.2901-008.2357]: {t.text}\n" for t in members if t.text is not None)
        write_text(session / "dialog" / "transcriptions" / f"{dialog}.txt", f"{spoken}M: [BREATHING]\n", encoding)
        write_wav(session / "dialog" / "wav" / f"{dialog}.wav")
        for turn in members:
            if turn.audio:
                write_wav(session / "sentences" / "wav" / dialog / f"{turn.name}.wav", duration_s=duration_s)
            write_text(session / "sentences" / "wav" / dialog / f"._{turn.name}.wav", "\x00\x05\x16\x07")
    return root


# --- ESD -------------------------------------------------------------------------------------------------------------


def esd_name(number: int) -> str:
    return ESD_NAMES[(number - 1) // 350]


def esd_split(number: int) -> str:
    place = (number - 1) % 350 + 1
    return "evaluation" if place <= 20 else "test" if place <= 50 else "train"


def esd_line(speaker: str, number: int) -> str:
    return f"{speaker}_{number:06d}\tIt is number {number}.\t{esd_name(number)}"


def write_esd(
    root: Path,
    speakers: Sequence[str] = ("0011", "0012"),
    numbers: Sequence[int] = (1, 21, 51, 351, 701, 1051, 1401),
    *,
    nested: bool = False,
    split_folders: bool = False,
    encoding: str = "utf-8",
    duration_s: float = SHORT_S,
) -> Path:
    """Either layout, with or without split folders; blank lines and macOS's files included."""
    top = root / "Emotion Speech Dataset" if nested else root
    for speaker in speakers:
        lines = "\r\n\r\n".join(esd_line(speaker, number) for number in numbers)
        write_text(top / speaker / f"{speaker}.txt", f"\r\n{lines}\r\n", encoding)
        write_text(top / speaker / f"._{speaker}.txt", "\x00\x05\x16\x07")
        for number in numbers:
            folder = top / speaker / esd_name(number) / (esd_split(number) if split_folders else "")
            write_wav(folder / f"{speaker}_{number:06d}.wav", duration_s=duration_s)
            write_text(folder / f"._{speaker}_{number:06d}.wav", "\x00\x05\x16\x07")
    write_text(root / "__MACOSX" / speakers[0] / f"._{speakers[0]}.txt", "\x00\x05\x16\x07")
    write_text(top / "ReadMe.txt", "The ESD database only can be used for research purpose.")
    return root


# --- MSP-Podcast -----------------------------------------------------------------------------------------------------

MSP_HEADER = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"


@dataclass(frozen=True)
class Segment:
    """One turn of MSP-Podcast; dimensions 1 to 7."""

    stem: str
    emotion: str = "N"
    arousal: str = "2.2"
    valence: str = "4.0"
    dominance: str = "2.6"
    speaker: str = "30"
    split: str = "Train"
    text: str | None = "And that was it."
    audio: bool = True

    @property
    def csv_line(self) -> str:
        rated = f"{self.emotion},{self.arousal},{self.valence},{self.dominance}"
        return f"{self.stem}.wav,{rated},{self.speaker},Male,{self.split}"

    @property
    def text_block(self) -> str:
        rated = f"A:{float(self.arousal):f}; V:{float(self.valence):f}; D:{float(self.dominance):f};"
        worker = "WORKER00000023; Neutral; Neutral,Concerned; A:3.000000; V:4.000000; D:4.000000;"
        return f"{self.stem}.wav; {self.emotion}; {rated}\n{worker}\n{worker}\n\n"


MSP_SEGMENTS = (
    Segment("MSP-PODCAST_0001_0008", split="Test1"),
    Segment("MSP-PODCAST_0001_0019", "A", "6.4", "1.6", "5.8", speaker="Unknown"),
    Segment("MSP-PODCAST_0002_0033", "H", "5.0", "6.4", "4.0", speaker="127", split="Development"),
    Segment("MSP-PODCAST_0003_0001", "S", "1.0", "1.0", "1.0", split="Test2"),
    Segment("MSP-PODCAST_0003_0002_0001", "U", "7.0", "7.0", "7.0"),
    Segment("MSP-PODCAST_0004_0004", "F"),
    Segment("MSP-PODCAST_0004_0005", "O"),
    Segment("MSP-PODCAST_0004_0006", "X"),
)


def write_msp_podcast(
    root: Path,
    segments: Sequence[Segment] = MSP_SEGMENTS,
    *,
    release: str = "csv",
    encoding: str = "utf-8",
    duration_s: float = SHORT_S,
) -> Path:
    """A new release (`release="csv"`) or one up to 1.8 (`"txt"`: labels, partitions and speakers in three files)."""
    (root / "Audios").mkdir(parents=True, exist_ok=True)
    for segment in segments:
        if segment.audio:
            write_wav(root / "Audios" / f"{segment.stem}.wav", duration_s=duration_s)
            write_text(root / "Audios" / f"._{segment.stem}.wav", "\x00\x05\x16\x07")
        if segment.text is not None:
            write_text(root / "Transcripts" / f"{segment.stem}.txt", f"{segment.text}\n", encoding)
    if release == "csv":
        lines = "\r\n".join([MSP_HEADER, *(segment.csv_line for segment in segments)])
        write_text(root / "Labels" / "labels_consensus.csv", f"{lines}\r\n", "utf-8-sig")
        raters = "".join(f'{s.stem}.wav,WORKER00000023,Neutral,"Neutral,Concerned",3\n' * 2 for s in segments)
        write_text(
            root / "Labels" / "labels_detailed.csv", f"FileName,Worker,EmoClass_Major,EmoClass_Second,EmoAct\n{raters}"
        )
        return root
    write_text(root / "Labels.txt", "".join(segment.text_block for segment in segments))
    write_text(root / "Partitions.txt", "".join(f"{s.split}; {s.stem}.wav\n" for s in segments))
    speakers = "Speaker_30; Male\nSpeaker_127; Female\n\n" + "".join(f"{s.stem}.wav; {s.speaker}\n" for s in segments)
    write_text(root / "Speaker_ids.txt", speakers)
    return root
