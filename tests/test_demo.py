"""The page to draw on: its answers, the requests that it refuses, and drawing in a browser."""

import base64
import hashlib
import http.client
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import webbrowser

import numpy as np
from PIL import Image
import pytest

from common.embedder import Embedder
from common.errors import InputError
import data
from helpers import ROOT, small_network, train_small
from tools.demo import PAGE, SIDE, Demo, main
from tools.demo_server import Server

TRAINED = [ROOT / 'data' / 'trained' / name for name in ('softmax', 'center_loss')]
# Corners of a 3, in 280ths of the drawing area from its middle.
THREE = [(-55, -70), (-20, -90), (30, -85), (55, -55), (40, -20), (-5, -5)]
THREE += [(45, 15), (60, 55), (30, 90), (-25, 95), (-60, 70)]
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
CHROMEDRIVER = shutil.which('chromedriver')


@pytest.fixture(scope='module')
def digits():
    return data.load_digits('mnist-5k')


@pytest.fixture(scope='module')
def demo(digits):
    return Demo([*map(Embedder, TRAINED)], digits)


def serve(demo, port=0):
    server = Server(PAGE.read_text(encoding='utf-8'), SIDE * SIDE, port)
    server.show(demo.scene, demo.answer)
    return server


@pytest.fixture(scope='module')
def server(demo):
    with serve(demo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method, path, body=b'', **headers):
    """The status, the headers and the text of a response; ``_`` in a header's name is a hyphen."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    connection.putrequest(method, path, skip_host='Host' in headers)
    for name, value in {'Content_Length': len(body), **headers}.items():
        if value is not None:
            connection.putheader(name.replace('_', '-'), value)
    connection.endheaders(body or None)
    response = connection.getresponse()
    return response.status, response.headers, response.read().decode()


def drawing(image):
    """The bytes that the page sends when an image is drawn over the whole area."""
    return Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC).tobytes()


def pixels_of(sample):
    return np.frombuffer(base64.b64decode(sample), np.uint8).reshape(28, 28)


def nearest_center(run, point):
    """The class of the center next to a point of the plane."""
    return int(np.linalg.norm(np.array(run['centers']) - point, axis=1).argmin())


def test_scene_shows_the_clusters(demo, digits):
    scene = json.loads(json.dumps(demo.scene))
    assert [run['name'] for run in scene['runs']] == [
        'softmax only',
        'softmax + center loss, λ = 1',
    ]
    assert scene['classNames'] == [*'0123456789'] and len(scene['colors']) == 10
    for run in scene['runs']:
        assert run['labels'] == digits.val_labels.tolist() and len(run['points']) == 1000
        nearest = [nearest_center(run, point) for point in run['points']]
        assert np.mean(nearest == digits.val_labels) > 0.95


def test_samples_are_seen_as_their_classes(demo):
    assert sorted(demo.scene['samples']) == [*range(10)]
    for label, sample in demo.scene['samples'].items():
        answers = demo.answer(drawing(pixels_of(sample)))['runs']
        for answer, run in zip(answers, demo.scene['runs'], strict=True):
            assert answer['class'] == label and not answer['isUnlikeAll']
            np.testing.assert_allclose(sum(answer['probabilities']), 1, atol=1e-3)
            # The embedding has two dimensions, and the plane shows the distances as they are.
            distances = np.linalg.norm(np.array(run['centers']) - answer['point'], axis=1)
            np.testing.assert_allclose(answer['distances'], distances, atol=1e-3)
        assert np.argmin(answers[1]['distances']) == label  # with center loss


def test_more_dimensions_are_seen_in_a_plane(in_own_folder, digits):
    train_small(small_network(embedding_dim=5), num_epochs=1)
    demo = Demo([Embedder('run')], digits)
    (run,) = demo.scene['runs']
    assert not run['isPlane'] and 'Shown are principal component 1 of 5' in run['caption']
    assert np.shape(run['points']) == (1000, 2) and np.shape(run['centers']) == (10, 2)
    (answer,) = demo.answer(drawing(digits.val_images[0]))['runs']
    assert len(answer['point']) == 2 and len(answer['distances']) == 10


def test_one_dimension_is_refused(in_own_folder, digits):
    train_small(small_network(embedding_dim=1), num_epochs=1)
    with pytest.raises(InputError, match='run embeds in 1 dimension'):
        Demo([Embedder('run')], digits)


def test_other_data_is_refused(digits):
    smaller = digits._replace(val_images=digits.val_images[:, 4:24, 4:24])
    with pytest.raises(InputError, match='images of another size'):
        Demo([Embedder(TRAINED[1])], smaller)
    others = digits._replace(val_labels=digits.val_labels + 10)
    with pytest.raises(InputError, match='has no image of the classes of'):
        Demo([Embedder(TRAINED[1])], others)


def test_answers_over_http(server, demo, digits):
    pixels = drawing(digits.val_images[0])
    status, headers, text = ask(server, 'POST', '/embed', pixels)
    assert status == 200 and headers['Content-Type'] == 'application/json'
    assert json.loads(text) == demo.answer(pixels)


def test_page_is_whole_and_closed(server):
    status, headers, page = ask(server, 'GET', '/')
    assert status == 200 and page == PAGE.read_text(encoding='utf-8')
    assert headers['X-Content-Type-Options'] == 'nosniff'
    policy = headers['Content-Security-Policy']
    assert "default-src 'self'" in policy and 'unsafe' not in policy
    for tag in ('script', 'style'):
        (content,) = re.findall(f'<{tag}>(.*?)</{tag}>', page, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    # Nothing is fetched from anywhere, and no attribute holds what the policy would not allow.
    assert not re.search(
        r'(?:src|href)="(?!data:)|@import|//[a-z]+\.|style="|\son\w+="',
        page.replace('http://www.w3.org', ''),
    )


def test_only_this_machine_is_listened_to(server):
    assert server.socket.getsockname()[0] == '127.0.0.1'


@pytest.mark.parametrize('name', ['127.0.0.1', 'localhost'])
def test_both_names_are_served(server, name):
    host = f'{name}:{server.server_port}'
    assert ask(server, 'GET', '/', Host=host, Origin=f'http://{host}')[0] == 200


BAD_REQUESTS = {
    'other host': ({'Host': 'example.org'}, 'Host has to be 127.0.0.1:PORT.'),
    'other port': ({'Host': '127.0.0.1:1'}, 'Host has to be'),
    'no host': ({'Host': None}, 'Host has to be'),
    'other site': ({'Origin': 'http://example.org'}, 'Origin has to be http://127.0.0.1:PORT.'),
    'sandbox': ({'Origin': 'null'}, 'Origin has to be'),
    'no length': ({'Content_Length': None}, f'A drawing has {SIDE * SIDE} bytes'),
    'short': ({'Content_Length': SIDE * SIDE - 1}, f'A drawing has {SIDE * SIDE} bytes'),
    'long': ({'Content_Length': 10**15}, f'A drawing has {SIDE * SIDE} bytes'),
    'negative length': ({'Content_Length': -1}, f'A drawing has {SIDE * SIDE} bytes'),
    'no number': ({'Content_Length': '5e4'}, f'A drawing has {SIDE * SIDE} bytes'),
    'chunked': (
        {'Content_Length': None, 'Transfer_Encoding': 'chunked'},
        f'A drawing has {SIDE * SIDE} bytes',
    ),
}


@pytest.mark.parametrize(('headers', 'sentence'), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_request(server, headers, sentence):
    status, received, text = ask(server, 'POST', '/embed', bytes(SIDE * SIDE), **headers)
    assert status == 400 and received['Content-Type'].startswith('text/plain')
    assert text.startswith(sentence.replace('PORT', str(server.server_port)))
    assert text.count('\n') == 1
    assert received['X-Content-Type-Options'] == 'nosniff'


def test_sentence_reaches_who_sends_too_much(server):
    status, _, text = ask(server, 'POST', '/embed', bytes(10 * SIDE * SIDE))
    assert status == 400 and text.startswith('A drawing has')


def test_drawing_that_ends_early(server):
    with socket.create_connection(server.server_address, timeout=20) as connection:
        host = f'127.0.0.1:{server.server_port}'
        head = f'POST /embed HTTP/1.1\r\nHost: {host}\r\nContent-Length: {SIDE * SIDE}\r\n\r\n'
        connection.sendall(head.encode() + bytes(100))
        connection.shutdown(socket.SHUT_WR)
        answer = connection.makefile('rb').read().decode()
    assert answer.startswith('HTTP/1.0 400 ') and 'ends after 100 of' in answer


def test_what_is_no_request(server):
    with socket.create_connection(server.server_address, timeout=20) as connection:
        connection.sendall(b'draw a three please\r\n\r\n')
        assert connection.makefile('rb').read().startswith(b'HTTP/1.0 400 ')


@pytest.mark.parametrize(
    ('method', 'path', 'status'),
    [('GET', '/nothing', 404), ('GET', '/../train.py', 404), ('POST', '/', 404), ('PUT', '/', 501)],
)
def test_nothing_else_is_there(server, method, path, status):
    assert ask(server, method, path)[0] == status


def test_taken_port_is_named(server):
    """Before the run is loaded."""
    with pytest.raises(InputError, match=f'--port={server.server_port} cannot be used'):
        main([f'--port={server.server_port}', '--model-prefix=missing'])


def test_browser_is_opened(monkeypatch, capsys):
    opened = queue.Queue()
    monkeypatch.setattr(webbrowser, 'open', opened.put)
    monkeypatch.setattr(Server, 'serve_forever', lambda server: None)
    monkeypatch.setenv('BROWSER', 'some')
    options = [f'--model-prefix={TRAINED[1]}', '--dataset=mnist-5k']
    main(options)
    url = opened.get(timeout=20)
    assert re.fullmatch(r'http://127\.0\.0\.1:\d+/', url) and url in capsys.readouterr().out
    main([*options, '--no-browser'])
    assert opened.empty()


@pytest.mark.slow
def test_ctrl_c_ends_it():
    command = [sys.executable, '-m', 'tools.demo', f'--model-prefix={TRAINED[1]}', '--no-browser']
    with subprocess.Popen(
        [*command, '--dataset=mnist-5k'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()  # about the network
        url = re.search(r'http://[^,]+', process.stdout.readline())[0]
        with urllib.request.urlopen(url, timeout=20) as response:
            assert response.read().decode() == PAGE.read_text(encoding='utf-8')
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr.read() == ''


@pytest.fixture
def browser():
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip('no browser: needs chromium and chromedriver (apt-get: chromium-driver)')
    webdriver = pytest.importorskip('selenium.webdriver', reason='needs selenium')
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.add_argument('--headless=new')
    options.add_argument('--disable-dev-shm-usage')
    if os.getuid() == 0:  # Chromium's sandbox is not for root
        options.add_argument('--no-sandbox')
    driver = webdriver.Chrome(options, webdriver.ChromeService(CHROMEDRIVER))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


def wait_for(browser, condition):
    """Wait until an expression of the page's script is true, and return its value."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda _: browser.execute_script(f'return {condition}'))


@pytest.mark.slow
def test_three_is_drawn(browser, server, demo, monkeypatch):
    from selenium.webdriver import ActionChains, Keys

    browser.get(server.url)
    wait_for(browser, 'panels.length === 2')
    pad = browser.find_element('id', 'pad')
    stroke = ActionChains(browser, duration=20)
    for i, (x, y) in enumerate(THREE):
        stroke.move_to_element_with_offset(pad, x, y)
        if i == 0:
            stroke.click_and_hold()
    stroke.release().perform()
    wait_for(browser, '!isAsking && panels.every(panel => panel.answer)')
    for panel in browser.find_elements('class name', 'panel'):
        assert panel.find_element('css selector', '.verdict strong').text == '3'
        assert panel.find_element('css selector', 'tr.best th').text == '3'
        assert panel.find_element('css selector', 'tr.nearest th').text == '3'
    point, centers, points, labels = browser.execute_script(
        'const {answer, run} = panels[1]; '
        'return [answer.point, run.centers, run.points, run.labels]'
    )
    to_own = np.linalg.norm(np.array(points)[np.array(labels) == 3] - centers[3], axis=1)
    assert np.linalg.norm(np.subtract(point, centers[3])) < np.percentile(to_own, 99)
    assert '3, probability' in browser.find_element('id', 'spoken').text

    # By keyboard: the digit's key, its button, and Escape.
    press = ActionChains(browser)
    press.send_keys('7').perform()
    wait_for(browser, "document.querySelector('.verdict strong').textContent === '7'")
    button = browser.find_element('css selector', '#samples button[aria-label="Sample of 4"]')
    button.send_keys(Keys.ENTER)
    wait_for(browser, "document.querySelector('.verdict strong').textContent === '4'")
    press.send_keys(Keys.ESCAPE).perform()
    wait_for(browser, "document.querySelector('.verdict p').textContent === 'nothing drawn yet'")

    monkeypatch.setattr(demo.panels[0].embedder, 'rejection_distance', 0)
    press.send_keys('5').perform()
    wait_for(browser, "panels[1].sentence.includes('5, probability')")
    assert wait_for(browser, 'panels[0].sentence').startswith(
        'softmax only: like none of the classes'
    )

    # Nothing that the page's policy refuses, no error; and no sideways scrolling on a telephone.
    assert browser.get_log('browser') == []
    browser.execute_cdp_cmd(
        'Emulation.setDeviceMetricsOverride',
        {'width': 360, 'height': 740, 'deviceScaleFactor': 2, 'mobile': True},
    )
    wait_for(browser, 'innerWidth === 360')
    assert wait_for(browser, 'document.documentElement.scrollWidth') == 360
