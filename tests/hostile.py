"""Strings that somebody may name a run, a class or a folder, to see what happens."""

PAYLOADS = """
<script>pwn()</script>
</script><script>pwn()</script>
<img src=x onerror=pwn()>
"><img src=x onerror=pwn()>
'><svg onload=pwn()>
</style><script>pwn()</script>
</title><script>pwn()</script>
</textarea><script>pwn()</script>
<!--<script>pwn()</script>
--><script>pwn()</script>
<svg/onload=pwn()>
<body onload=pwn()>
<iframe src="javascript:pwn()">
<a href="javascript:pwn()">click</a>
<b>bold</b><br><i>x</i>
<math><mtext><script>pwn()</script>
<details open ontoggle=pwn()>
<input autofocus onfocus=pwn()>
<video src=x onerror=pwn()>
<object data="javascript:pwn()">
<embed src="javascript:pwn()">
<link rel=stylesheet href=http://evil.invalid/x.css>
<meta http-equiv=refresh content="0;url=http://evil.invalid">
<base href=http://evil.invalid/>
<form action=http://evil.invalid><button>go
<style>@import 'http://evil.invalid/x.css'</style>
" onmouseover="pwn()
' onmouseover='pwn()
` onmouseover=`pwn()
" autofocus onfocus="pwn()" x="
';pwn();//
";pwn();//
`;pwn();//
${pwn()}
{{7*7}}
{% raw %}x{% endraw %}
{{ config.__class__.__mro__ }}
{{ ''|attr('x') }}
%{customdata}
%{y:.2f}<extra></extra>
$\\href{javascript:pwn()}{x}$
$$\\unicode{x3c}script>$$
javascript:pwn()
data:text/html,<script>pwn()</script>
&lt;script&gt;pwn()&lt;/script&gt;
&#60;script&#62;pwn()&#60;/script&#62;
\\u003cscript\\u003epwn()
\\";pwn();//
]]><script>pwn()</script>
]};pwn();//
__proto__
constructor
toString
=cmd|' /C calc'!A0
+1+1
@SUM(1)
../../etc/passwd
C:\\Users\\x
[link=http://evil.invalid]x[/link]
[/x]
url(http://evil.invalid/x.png)
--x:url(http://evil.invalid)
é ü 漢字 🎉
null
NaN
""".strip().splitlines()
CONTROLS = [
    "\udcff name",
    "a\u202eb",
    "a\u2028pwn()\u2029b",
    "x\x00y",
    "tab\there",
    "\ufeffbom",
    "z" * 5000,
]
HOSTILE = PAYLOADS + CONTROLS
