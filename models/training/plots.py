"""The plots of the stories, as templates, and questions about them.

A plot is a text with one sentence slot a line. `{hero}` and its like are filled from the cast,
`[a|b]` picks one alternative, and a line that starts with `?` may be left out. Everything a story
says about a person, a thing or a place comes from the cast, so it stays the same to the end.
"""

OPENINGS = """Once upon a time, there was {a_adj} {kind} named {hero}. {He} lived {live}.
Once upon a time, {a_adj} {kind} named {hero} lived {live}.
Once there was {a_adj} {kind} called {hero} who lived {live}.
Once upon a time, {live}, there lived {a_adj} {kind} named {hero}.""".split("\n")

# name -> (plot, questions with answers that the lines without `?` settle)
PLOTS = {
    "lost": (
        """
[One {weather} {time}|One {time}], {hero} could not find {his} {color} {thing}.
?{He} loved the {thing} very much, because it was a gift from {his} grandmother.
[{hero} looked everywhere, but it was gone.|{He} looked at home and outside, but it was not there.]
?"Where can it be?" said {hero}, and {he} began to cry.
Then {hero} met {friend} the {fkind}.
"[Why are you sad?|What is wrong?]" asked {friend}.
"I lost my {color} {thing}," said {hero}.
"[Do not worry|Do not cry]. I will help you," said {friend}.
They looked and looked, and at last {friend} saw something {color} {spot}.
It was the {thing}! {hero} was very happy and hugged {friend}.
[From that day on, {hero} and {friend} were best friends.|"Thank you, {friend}," said {hero}. \
"You are a good friend."]""",
        """
What did {hero} lose?|{hero} lost {his} {color} {thing}.
Who helped {hero}?|{friend} the {fkind} helped {hero}.
Where was the {thing}?|The {thing} was {spot}.
What color was the {thing}?|The {thing} was {color}.""",
    ),
    "found": (
        """
One {time}, {hero} went for a walk and found {a_color} {thing} {spot}.
"[What a lovely {thing}|What a pretty {thing}]!" said {hero}. "I want to keep it."
?{He} took the {thing} home and put it next to {his} bed.
But then {hero} heard someone crying. It was {friend} the {fkind}.
"I lost my {thing}," said {friend}. "[It was a gift from my mother|I need it very much]."
[{hero} looked at the {color} {thing}. {He} wanted to keep it, but {he} knew what was right.\
|{hero} was sad to give the {thing} away, but {he} wanted to be good.]
"Here is your {thing}," said {hero}. "I found it {spot}."
{friend} was so happy that {fhe} gave {hero} [a big hug|some {food}].
[{hero} felt warm inside. It is good to be honest.|{hero} learned that being honest makes friends.]\
""",
        """
What did {hero} find?|{hero} found {a_color} {thing}.
Whose {thing} was it?|It was {friend}'s {thing}.
Where did {hero} find the {thing}?|{hero} found it {spot}.
Who was crying?|{friend} the {fkind} was crying.""",
    ),
    "share": (
        """
{hero} had a big basket of {food}. {He} wanted to eat everything alone.
[One {time}|One {weather} {time}], {friend} the {fkind} came by.
"I am so hungry," said {friend}. "May I have some {food}?"
"No," said {hero}. "[Everything in my basket is mine|All of this is mine]."
{friend} was sad and walked away.
?{hero} ate some {food}, but eating alone was not fun.
[Soon {hero} felt bad about it.|{hero} thought about it and felt sorry.] {He} ran after {friend}.
"I am sorry," said {hero}. "Please share my {food} with me."
They sat down {at_place} and ate together.
[The {food} tasted much better now.|They laughed and talked until the sun went down.]
[{hero} learned that sharing is fun.|After that day, {hero} always shared with {friend}.]""",
        """
What did {hero} have?|{hero} had a big basket of {food}.
Who was hungry?|{friend} the {fkind} was hungry.
What did {hero} learn?|{hero} learned that sharing is fun.""",
    ),
    "storm": (
        """
One {time}, a big storm came. The wind was strong, and the rain fell and fell.
[{hero} was safe in {his} little house.|{hero} was warm and dry at home.]
Then {he} heard a knock at the door. It was {friend} the {fkind}, and {fhe} was wet and cold.
"[My house fell down|The wind took my roof away]," said {friend}. "May I come in?"
"Of course," said {hero}. "Come in and get warm."
{hero} gave {friend} a {color} blanket and some {soup}.
?They told each other stories while the rain fell outside.
In the morning, the sun came out again.
{hero} and {friend} built a new house together. It took them {n} days.
["Thank you," said {friend}. "You are very kind."|Now {friend} lived next to {hero}, and they were \
never lonely again.]""",
        """
Who knocked at the door?|{friend} the {fkind} knocked at the door.
What did {hero} give {friend}?|{hero} gave {friend} a {color} blanket and some {soup}.
How many days did it take?|It took {n} days.
What color was the blanket?|The blanket was {color}.""",
    ),
    "afraid": (
        """
{hero} was afraid of the [dark|deep water|thunder].
?All the others laughed at {him}, and that made {him} sad.
One {time}, {friend} the {fkind} [fell into a hole|got stuck in the mud] {at_place}.
"Help! Help!" called {friend}. But nobody was near. Only {hero} heard it.
{hero} was afraid, but {he} wanted to help {his} friend.
{He} took {a_color} {thing} with {him} and ran as fast as {he} could.
["Hold on to the {thing}!" said {hero}.|{hero} held out the {thing}. "Hold on!" {he} said.]
{He} pulled and pulled, and at last {friend} was free.
"You saved me," said {friend}. "You are so brave."
{hero} smiled. {He} was not so afraid any more.""",
        """
Who called for help?|{friend} the {fkind} called for help.
Who saved {friend}?|{hero} the {kind} saved {friend}.
What did {hero} take?|{hero} took {a_color} {thing}.""",
    ),
    "party": (
        """
[Today was|It was] {hero}'s birthday, but nobody said a word about it.
"[Did they all forget|Has everybody forgotten] my birthday?" thought {hero}.
{He} went to see {friend} the {fkind}, but {friend} was not at home.
?{hero} sat down {spot} and felt very lonely.
When it got dark, {hero} walked home {slowly}.
{He} opened the door, and [all the lights went on|there was a bright light].
"Happy birthday, {hero}!" said {friend}. All {his} friends were there.
There was a big cake with {crop} on it, and {friend} gave {him} {a_color} {thing}.
?"I love my new {thing}," said {hero}.
It was the best birthday ever.""",
        """
What did {friend} give {hero}?|{friend} gave {hero} {a_color} {thing}.
Whose birthday was it?|It was {hero}'s birthday.
What did the cake have on it?|The cake had {crop} on it.""",
    ),
    "race": (
        """
One {time}, {hero} and {friend} the {fkind} had a race {at_place}.
"I am faster than you," said {friend}. "[I will win|You can not win]."
"We will see," said {hero}.
They began to run. {friend} was very fast and was soon far ahead.
["I have a lot of time," said {friend}.|"This is easy," said {friend}.] {Fhe} sat down {spot} \
and ate some {food}.
Soon {friend} fell asleep.
{hero} was not fast, but {he} did not stop. {He} went on, step by step.
When {friend} woke up, {hero} was already at the end.
"I won!" said {hero}. {He} got {a_color} {thing} as a prize.
["Well done," said {friend}. "I should not have been so proud."\
|{friend} learned not to be so proud.]\
""",
        """
Who won the race?|{hero} the {kind} won the race.
Who fell asleep?|{friend} the {fkind} fell asleep.
What was the prize?|The prize was {a_color} {thing}.""",
    ),
    "magic": (
        """
One {weather} {time}, {hero} found an old {thing} {spot}.
When {he} [touched it|picked it up], the {thing} began to glow {color}.
"I am a magic {thing}," it said. "I can give you one wish."
?{hero} thought for a long time. {He} could wish for gold or for a big house.
Then {hero} saw {friend} the {fkind}, who was [sick in bed|hurt and could not walk].
"I wish for {friend} to be well again," said {hero}.
The {thing} glowed once more, and then the light was gone.
[The next morning|Soon], {friend} was well and came to play.
"[How did that happen?|I feel so good!]" said {friend}. {hero} only smiled.
[{hero} never told anyone about the wish.|It was the best wish of all.]""",
        """
What did {hero} find?|{hero} found an old {thing}.
What did {hero} wish for?|{hero} wished for {friend} to be well again.
What color did the {thing} glow?|The {thing} glowed {color}.""",
    ),
    "garden": (
        """
{hero} wanted to grow {crop} in {his} garden.
{He} dug a hole, put in {n} seeds and gave them water every day.
But nothing came up. {hero} was [sad|very sad].
"[I will never grow anything|It does not work]," {he} told {friend} the {fkind}.
"You must wait," said {friend}. "Good things take time."
?So {hero} waited. {He} sang to the seeds, and {he} read them stories.
{n} weeks later, there was something green in the garden.
The plants grew and grew, and soon there was a basket full of {crop}.
{hero} and {friend} [made a big meal|had a feast] and ate {crop} all day.
["You were right," said {hero}. "Good things take time."\
|{hero} was glad that {he} had waited.]""",
        """
What did {hero} want to grow?|{hero} wanted to grow {crop}.
How many seeds did {hero} put in?|{hero} put in {n} seeds.
What did {friend} say?|{friend} said that good things take time.""",
    ),
    "song": (
        """
{hero} loved to sing, but {he} was too shy to sing for others.
?{He} only sang when {he} was alone {at_place}.
One {time}, {friend} the {fkind} heard {him}.
"[What a beautiful song|You sing so well]!" said {friend}. "Will you sing at the big party?"
"Oh no," said {hero}. "[I am too shy|I can not do that]."
{friend} gave {him} {a_color} {thing}. "Hold this when you sing," {fhe} said. "It will make you \
brave."
At the party, {hero} held the {color} {thing} and began to sing.
Everyone was quiet, and then everyone clapped.
"[The {thing} is magic!|Your {thing} made me brave!]" said {hero}.
"No," said {friend}. "It is only a {thing}. You were brave all by yourself." """,
        """
What did {hero} love to do?|{hero} loved to sing.
What did {friend} give {hero}?|{friend} gave {hero} {a_color} {thing}.
Who heard {hero}?|{friend} the {fkind} heard {hero}.""",
    ),
    "treasure": (
        """
One {time}, {hero} found an old map {spot}.
"[This map shows a treasure|There must be a treasure]!" {he} told {friend} the {fkind}. "Let us \
look for it."
They packed some {food} and walked for {n} days.
?They slept under the stars, and the nights were cold.
First they crossed [a wide river|a dark forest]. Then they climbed [a high hill|a steep mountain].
At last they found a box. {hero} opened it, and {friend} looked inside.
There was no gold in the box. There was only {a_color} {thing}.
[{hero} was sad at first, but then {friend} began to laugh.|They looked at each other and laughed.]
"The walk with you was the real treasure," said {friend}.
They took the {thing} home, and they never forgot that trip.""",
        """
What was in the box?|There was {a_color} {thing} in the box.
How many days did they walk?|They walked for {n} days.
Who went with {hero}?|{friend} the {fkind} went with {hero}.
What did they pack?|They packed some {food}.""",
    ),
    "newcomer": (
        """
One {time}, a new {fkind} came to the {place}. {Fhis} name was {friend}.
Nobody wanted to play with {friend}, because {fhe} [looked different|was so quiet].
{hero} saw that {friend} sat all alone {spot}.
"Hello," said {hero}. "Do you want to play with my {color} {thing}?"
"[Yes, please|I would love to]," said {friend}, and {fhe} smiled for the first time.
?They played with the {thing} until the sun went down.
{friend} showed {hero} how to make {food}, and {hero} showed {friend} all of the {place}.
Soon the others came and wanted to play too.
[Now {friend} had many friends, but {hero} was the best of them.|"Thank you for saying hello," \
said {friend}. "Now this is my home."]""",
        """
Who came to the {place}?|{friend} the {fkind} came to the {place}.
What did they play with?|They played with {a_color} {thing}.
What did {friend} show {hero}?|{friend} showed {hero} how to make {food}.""",
    ),
    "sleep": (
        """
One night, {hero} could not sleep.
{He} drank some milk, but {he} was still awake. {He} counted {n} stars, but {he} was still awake.
So {hero} went out and saw {friend} the {fkind} {spot}.
"I can not sleep," said {hero}. "[Me neither|I am awake too]," said {friend}.
?The moon was big and round, and the {place} was very quiet.
"Let us tell each other what we did today," said {friend}.
{hero} told {friend} about {his} {color} {thing}, and {friend} told {hero} about {fhis} {food}.
[Their eyes got smaller and smaller.|They talked more and more slowly.]
Soon both of them were fast asleep. Good night, {hero}. Good night, {friend}.""",
        """
Who could not sleep?|{hero} the {kind} could not sleep.
How many stars did {hero} count?|{hero} counted {n} stars.
What did {hero} talk about?|{hero} talked about {his} {color} {thing}.""",
    ),
    "build": (
        """
{hero} wanted to build [a little boat|a small house|a tall tower] {at_place}.
"I can do it alone," said {hero}. But the wood was too heavy.
{hero} tried {n} times, and {n} times it fell down.
"[Can I help you?|Do you need help?]" asked {friend} the {fkind}.
"No," said {hero}. But it fell down again. "Well, yes, please help me," {he} said.
?{friend} held the wood, and {hero} used the hammer.
They worked all day. When they were hungry, they ate {food}.
In the evening it was done. They put {a_color} {thing} on top of it.
["Together we can do anything," said {friend}.\
|{hero} learned that it is good to ask for help.]""",
        """
How many times did {hero} try?|{hero} tried {n} times.
Who helped {hero}?|{friend} the {fkind} helped {hero}.
What did they put on top?|They put {a_color} {thing} on top.""",
    ),
}
