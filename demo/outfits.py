"""The clothes and tools of each profession, each as a small recipe of shapes."""

from collections.abc import Callable
from dataclasses import dataclass

from pen import BLACK, WHITE, shade

RED, GOLD, SILVER, NAVY = (214, 40, 48), (246, 204, 60), (206, 212, 220), (30, 44, 92)
WOOD = (150, 96, 52)


def nothing(pen):
    """Draws nothing, for outfits without scenery, clothing details or a tool."""


@dataclass(frozen=True)
class Outfit:
    background: tuple
    cloth: tuple
    clothes: Callable = nothing
    hat: Callable | None = None  # hides the hair on top
    face: Callable = nothing
    tool: Callable = nothing
    scenery: Callable = nothing


def _overalls(pen, colour):
    pen.box(22, 54, 42, 80, colour, radius=2)
    pen.box(21, 46, 25, 58, colour)
    pen.box(39, 46, 43, 58, colour)
    pen.oval(23, 56, 1.3, 1.3, GOLD)
    pen.oval(41, 56, 1.3, 1.3, GOLD)


def _suit(pen, jacket, tie):
    pen.poly((26, 45), (38, 45), (32, 62), fill=WHITE)
    pen.poly((30.4, 47), (33.6, 47), (35, 66), (29, 66), fill=tie)
    pen.poly((24, 45), (27, 45), (32, 66), (20, 66), fill=shade(jacket, 0.7))
    pen.poly((40, 45), (37, 45), (32, 66), (44, 66), fill=shade(jacket, 0.7))


def _stethoscope(pen):
    pen.poly((26, 45), (38, 45), (32, 56), fill=(90, 150, 210))
    pen.arc(32, 47, 8, 11, 0, 180, (40, 50, 70), 1.5)
    pen.line((32, 58), (32, 61), fill=(40, 50, 70), width=1.5)
    pen.oval(32, 61, 2.2, 2.2, (40, 50, 70))
    pen.line((22, 50), (22, 66), fill=(200, 206, 214), width=1)
    pen.line((42, 50), (42, 66), fill=(200, 206, 214), width=1)


def _nurse_cap(pen):
    pen.poly((20, 19), (44, 19), (42, 9), (22, 9), fill=WHITE)
    pen.box(30.7, 10, 33.3, 18, RED)
    pen.box(28, 12.7, 36, 15.3, RED)


def _scrubs(pen):
    pen.poly((26, 45), (38, 45), (32, 54), fill=WHITE)
    pen.box(40, 55, 47, 62, shade((50, 170, 165), 0.8))


def _skyline(pen):
    for x, top in ((0, 14), (9, 4), (46, 8), (56, 18)):
        pen.box(x, top, x + 8, 64, (66, 98, 150))
        for y in range(top + 3, 60, 6):
            pen.box(x + 1.5, y, x + 6.5, y + 2.5, (236, 232, 170))


def _toque(pen):
    for x in (24, 32, 40):
        pen.oval(x, 7, 6.2, 6.2, WHITE)
    pen.box(21, 8, 43, 18.5, WHITE, radius=1)
    pen.line((21, 17.5), (43, 17.5), fill=(196, 196, 202), width=1)


def _chef_jacket(pen):
    pen.poly((25, 44), (39, 44), (32, 53), fill=RED)
    for y in (55, 60):
        pen.oval(28, y, 1.2, 1.2, BLACK)
        pen.oval(36, y, 1.2, 1.2, BLACK)


def _straw_hat(pen):
    pen.oval(32, 18, 19, 4.5, (236, 200, 104))
    pen.box(22, 6, 42, 18, (244, 212, 124), radius=5)
    pen.box(22, 14, 42, 17, (170, 70, 50))


def _field(pen):
    pen.box(0, 38, 64, 64, (96, 176, 70))
    pen.box(0, 36, 64, 40, (214, 190, 80))


def _plaid(pen):
    for x in (16, 22, 42, 48):
        pen.line((x, 48), (x, 66), fill=(250, 190, 180), width=0.8)
    _overalls(pen, (58, 92, 170))


def _hard_hat(pen):
    pen.draw.chord(pen.corners(19, 5, 45, 33), 180, 360, (255, 214, 30))
    pen.box(17.5, 17, 46.5, 20, (255, 214, 30), radius=1)
    pen.box(30, 5, 34, 17, (226, 176, 10), radius=1)


def _vest(pen):
    pen.poly((26, 45), (38, 45), (32, 58), fill=(90, 90, 100))
    for x in (18, 42):
        pen.box(x, 46, x + 3.5, 66, (250, 250, 120))
    pen.box(12, 57, 52, 60, (250, 250, 120))


def _sheriff_hat(pen):
    pen.oval(32, 18.5, 19.5, 4, (106, 66, 34))
    pen.poly((22, 18), (23, 5), (32, 8), (41, 5), (42, 18), fill=(122, 78, 42))
    pen.star(32, 12.6, 3.4, GOLD)


def _sun(pen):
    pen.oval(53, 13, 8, 8, (255, 226, 110))
    pen.box(0, 50, 64, 64, (196, 110, 60))


def _badge(pen):
    pen.poly((26, 45), (38, 45), (32, 53), fill=RED)
    pen.star(42, 56, 6, GOLD)


def _shelves(pen):
    colours = ((196, 60, 56), (60, 110, 180), (230, 190, 80), (80, 150, 90), (150, 90, 160))
    for row, y in enumerate((0, 22, 44)):
        for i in range(11):
            pen.box(i * 6, y + 2, i * 6 + 4.6, y + 18, colours[(i + row) % 5])
        pen.box(0, y + 18, 64, y + 22, (92, 58, 34))


def _reading_cardigan(pen):
    pen.poly((26, 45), (38, 45), (32, 60), fill=(250, 240, 214))


def _glasses(pen):
    for x in (27.3, 36.7):
        pen.arc(x, 26.6, 4.3, 4, 0, 360, (60, 30, 110), 1.1)
    pen.line((31, 26), (33, 26), fill=(60, 30, 110), width=1.1)


def _book(pen):
    pen.poly((18, 53), (32, 56), (46, 53), (46, 63), (32, 66), (18, 63), fill=(170, 40, 60))
    pen.poly((20, 52), (32, 55), (32, 64), (20, 61), fill=WHITE)
    pen.poly((44, 52), (32, 55), (32, 64), (44, 61), fill=(236, 236, 228))


def _wrench(pen):
    pen.line((54, 62), (54, 36), fill=SILVER, width=4)
    pen.oval(54, 33, 5.5, 5.5, SILVER)
    pen.box(52.4, 26, 55.6, 33, (92, 100, 112))


def _red_cap(pen):
    pen.draw.chord(pen.corners(20, 8, 44, 32), 180, 360, (206, 48, 40))
    pen.box(19, 18, 45, 21, (160, 30, 30), radius=1.5)


def _work_overalls(pen):
    _overalls(pen, (36, 74, 150))
    pen.box(28, 58, 36, 64, (60, 104, 186))


def _blackboard(pen):
    pen.box(0, 0, 64, 3, WOOD)
    for y, end in ((9, 16), (15, 12), (21, 15)):
        pen.line((4, y), (end, y), fill=(226, 240, 226), width=1.3)
    pen.line((50, 9), (60, 9), fill=(226, 240, 226), width=1.3)
    pen.line((50, 19), (55, 13), (60, 19), (50, 19), fill=(250, 226, 120), width=1.3)


def _cardigan(pen):
    pen.poly((25, 45), (39, 45), (32, 56), fill=WHITE)
    pen.line((32, 56), (32, 66), fill=(190, 120, 20), width=1.2)


def _headset(pen):
    pen.arc(32, 25, 14, 15, 190, 350, (40, 40, 50), 2)
    pen.box(17, 23, 21, 32, (40, 40, 50), radius=1.5)
    pen.line((19, 31), (23, 38), (28, 38), fill=(40, 40, 50), width=1.4)


def _desk(pen):
    pen.box(0, 56, 64, 64, (170, 112, 62))
    pen.box(0, 56, 64, 58, (206, 148, 92))
    pen.draw.chord(pen.corners(47, 49, 59, 63), 180, 360, GOLD)
    pen.oval(53, 48.5, 1.3, 1.3, GOLD)


def _blouse(pen):
    pen.poly((25, 45), (39, 45), (32, 56), fill=(240, 226, 250))


def _bandana(pen):
    pen.draw.chord(pen.corners(20, 8, 44, 34), 180, 360, (240, 120, 170))
    for x, y in ((26, 15), (32, 12), (38, 15), (32, 18)):
        pen.oval(x, y, 1.1, 1.1, WHITE)


def _bubbles(pen):
    for x, y, r in ((6, 10, 4), (13, 24, 3), (54, 8, 3), (6, 40, 3)):
        pen.oval(x, y, r, r, (226, 250, 255))


def _apron(pen):
    pen.box(22, 52, 42, 80, (250, 250, 250), radius=2)
    pen.line((24, 46), (24, 54), fill=WHITE, width=2)
    pen.line((40, 46), (40, 54), fill=WHITE, width=2)


def _mop(pen):
    pen.line((56, 64), (56, 22), fill=WOOD, width=2)
    pen.poly((51, 22), (61, 22), (63, 8), (49, 8), fill=(244, 240, 220))
    for x in (52, 56, 60):
        pen.line((x, 20), (x, 8), fill=(200, 196, 170), width=0.8)
    pen.oval(55.5, 52, 4, 4.5, (255, 226, 50))


def _peaked_cap(pen):
    pen.poly((20, 17), (17, 8), (32, 4), (47, 8), (44, 17), fill=NAVY)
    pen.box(20, 15, 44, 18, BLACK)
    pen.oval(32, 18.8, 11, 2.2, BLACK)
    pen.star(32, 11, 3.2, GOLD)


def _bricks(pen):
    for row, y in enumerate(range(0, 64, 8)):
        pen.line((0, y), (64, y), fill=(214, 170, 150), width=0.9)
        for x in range(8 if row % 2 else 0, 65, 16):
            pen.line((x, y), (x, y + 8), fill=(214, 170, 150), width=0.9)


def _uniform(pen):
    pen.poly((27, 45), (37, 45), (32, 52), fill=(150, 180, 220))
    pen.poly((31, 49), (33, 49), (34, 64), (30, 64), fill=BLACK)
    pen.box(13, 47, 20, 49.5, GOLD)
    pen.box(44, 47, 51, 49.5, GOLD)
    pen.oval(42, 56, 2.6, 3, GOLD)


def _planks(pen):
    for x in range(0, 65, 10):
        pen.line((x, 0), (x, 64), fill=(164, 116, 62), width=1.2)


def _leather_apron(pen):
    _overalls(pen, (116, 68, 34))
    pen.box(27, 57, 37, 64, (90, 50, 24))


def _hammer(pen):
    pen.line((10, 64), (10, 38), fill=(96, 54, 24), width=3)
    pen.box(3, 32, 17, 39, (70, 74, 84), radius=1)


def _scissors(pen):
    pen.line((8, 34), (14, 52), fill=SILVER, width=2)
    pen.line((14, 34), (8, 52), fill=SILVER, width=2)
    pen.arc(7, 55, 3.4, 3.4, 0, 360, BLACK, 1.4)
    pen.arc(15, 55, 3.4, 3.4, 0, 360, BLACK, 1.4)


def _salon_apron(pen):
    pen.poly((25, 45), (39, 45), (32, 54), fill=(250, 190, 220))
    pen.box(38, 56, 45, 64, (70, 70, 78))
    pen.line((40, 52), (40, 58), fill=(250, 210, 90), width=1.2)


def _driver_cap(pen):
    pen.oval(32, 13.5, 13, 6.5, (70, 74, 84))
    pen.oval(32, 18.2, 12, 2.6, (44, 46, 54))


def _wheel(pen):
    pen.arc(32, 68, 19, 18, 180, 360, (26, 26, 30), 3.4)
    pen.line((32, 66), (32, 58), fill=(26, 26, 30), width=3)


def _road(pen):
    pen.poly((0, 64), (0, 44), (64, 44), (64, 64), fill=(96, 100, 106))
    pen.box(0, 0, 4, 64, (30, 32, 38))
    pen.box(60, 0, 64, 64, (30, 32, 38))


OUTFITS = {
    "person": Outfit((222, 222, 222), WHITE),
    "doctor": Outfit((150, 206, 226), (246, 248, 250), _stethoscope),
    "nurse": Outfit((250, 190, 200), (50, 170, 165), _scrubs, _nurse_cap),
    "CEO": Outfit((150, 182, 222), (44, 46, 58), lambda p: _suit(p, (44, 46, 58), RED),
                  scenery=_skyline),
    "cook": Outfit((250, 176, 74), (248, 248, 248), _chef_jacket, _toque),
    "farmer": Outfit((140, 208, 250), (206, 62, 56), _plaid, _straw_hat, scenery=_field),
    "construction worker": Outfit((176, 170, 164), (255, 122, 20), _vest, _hard_hat),
    "sheriff": Outfit((240, 140, 70), (206, 172, 116), _badge, _sheriff_hat, scenery=_sun),
    "librarian": Outfit((122, 80, 48), (58, 132, 84), _reading_cardigan, face=_glasses,
                        tool=_book, scenery=_shelves),
    "mechanic": Outfit((92, 100, 112), (120, 170, 230), _work_overalls, _red_cap, _wrench),
    "teacher": Outfit((34, 98, 68), (248, 196, 60), _cardigan, scenery=_blackboard),
    "receptionist": Outfit((206, 188, 240), (124, 64, 160), _blouse, face=_headset,
                           tool=_desk),
    "cleaner": Outfit((120, 226, 232), (240, 120, 170), _apron, _bandana, _mop, _bubbles),
    "guard": Outfit((156, 76, 58), (40, 58, 118), _uniform, _peaked_cap, scenery=_bricks),
    "carpenter": Outfit((200, 150, 90), (120, 150, 60), _leather_apron, tool=_hammer,
                        scenery=_planks),
    "hairdresser": Outfit((226, 70, 150), (32, 32, 38), _salon_apron, tool=_scissors),
    "driver": Outfit((120, 180, 250), (244, 208, 40), hat=_driver_cap, tool=_wheel,
                     scenery=_road),
}
