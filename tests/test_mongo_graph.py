import sys; sys.path.insert(0,'/work/main/tests')
import pytest
from recognition.graph import open_graph
from recognition.testing import GraphTests
class TestMongo(GraphTests):
    @pytest.fixture
    def graph(self, mongodb_url):
        g=open_graph(mongodb_url); yield g; g.close()
    @pytest.fixture
    def reopen(self, mongodb_url):
        opened=[]
        def reopen():
            opened.append(open_graph(mongodb_url)); return opened[-1]
        yield reopen
        for g in opened: g.close()
