"""The sentences of the synthetic corpus and the replies to them.

A sentence tells a plain fact, so that the emotion is in the voice alone. A reply does
what the paper asks of empathy: it reacts to the emotion and it explores, with a question about the topic of the
sentence.
"""

from typing import NamedTuple


class Sentence(NamedTuple):
    """A sentence and its topic, as a reply would name it."""

    text: str
    topic: str


SENTENCES = {
    "train": (
        Sentence("The meeting starts at ten tomorrow.", "the meeting"),
        Sentence("My sister is moving to another city.", "your sister"),
        Sentence("They sent the letter this morning.", "the letter"),
        Sentence("The train leaves from the other platform.", "the train"),
        Sentence("I talked to my manager today.", "your manager"),
        Sentence("The neighbours have a new dog.", "the dog"),
        Sentence("We are going to the lake on Sunday.", "the lake"),
        Sentence("The doctor called me back.", "the doctor"),
        Sentence("My phone is lying on the table.", "your phone"),
        Sentence("The results came out yesterday.", "the results"),
        Sentence("He asked me about the car.", "the car"),
        Sentence("The shop on the corner is closed.", "the shop"),
        Sentence("I read the last page of the book.", "the book"),
        Sentence("Our teacher changed the plan.", "the plan"),
        Sentence("She is coming home in the evening.", "the evening"),
        Sentence("The kitchen has been painted blue.", "the kitchen"),
        Sentence("My brother found the old photos.", "the photos"),
        Sentence("It has been snowing since noon.", "the snow"),
        Sentence("The bill arrived in the mail.", "the bill"),
        Sentence("They moved my desk to the window.", "your desk"),
        Sentence("The game was over by eight.", "the game"),
        Sentence("I am cooking dinner for six people.", "the dinner"),
        Sentence("The garden gate was left open.", "the garden"),
        Sentence("My friend wrote to me last night.", "your friend"),
    ),
    "validation": (
        Sentence("The concert is on Friday night.", "the concert"),
        Sentence("I got a message from the bank.", "the bank"),
        Sentence("My cousin works at the airport.", "your cousin"),
        Sentence("The room upstairs is empty.", "the room"),
        Sentence("We took the road along the river.", "the river"),
        Sentence("She put the keys in the drawer.", "the keys"),
        Sentence("The class has a new student.", "the class"),
        Sentence("They are building a bridge here.", "the bridge"),
        Sentence("My computer is at the office.", "your computer"),
        Sentence("The rain stopped an hour ago.", "the rain"),
    ),
    "test": (
        Sentence("The package is at the front door.", "the package"),
        Sentence("My mother is visiting next week.", "your mother"),
        Sentence("The film ended after midnight.", "the film"),
        Sentence("I saw the boss at the station.", "the boss"),
        Sentence("The cat slept on my chair.", "the cat"),
        Sentence("We have an exam on Thursday.", "the exam"),
        Sentence("He told me about the house.", "the house"),
        Sentence("The flight was moved to noon.", "the flight"),
        Sentence("There are twelve guests on the list.", "the guests"),
        Sentence("My uncle bought a boat.", "the boat"),
    ),
}

REPLIES = {
    "neutral": (
        "I see, thank you for telling me about {topic}. What would you like to do next?",
        "All right, I understand. Is there anything about {topic} you want to talk over?",
        "Okay, good to know. How do you feel about {topic}?",
    ),
    "happy": (
        "That is wonderful, you sound so happy! What do you like most about {topic}?",
        "I am so glad to hear the joy in your voice! What made {topic} so special?",
        "How lovely, your good mood is catching! Who will you share {topic} with?",
    ),
    "angry": (
        "I can hear how angry you are, and that is understandable. What bothers you most about {topic}?",
        "That sounds really frustrating. What went wrong with {topic}?",
        "You have every right to be upset. What would make things right with {topic}?",
    ),
    "sad": (
        "I am sorry, you sound so sad. Do you want to tell me more about {topic}?",
        "That sounds hard, and I am here for you. What hurts most about {topic}?",
        "I hear how heavy this feels for you. What has been on your mind about {topic}?",
    ),
    "surprise": (
        "Wow, you sound really surprised! What did you expect from {topic}?",
        "Oh, that must have been unexpected! How did you find out about {topic}?",
        "What a surprise, I can hear it! What happened next with {topic}?",
    ),
}
