// The database's side of the wire, as its server is written: net/http, one call after another over one connection.
// `first ADDRESS KEK KEK` makes the calls of the first and second generation, then is eight callers at once;
// `third ADDRESS` those of the third, as two servers at once, with a restart of the daemon between: it says
// `restart` and waits for a line. It knows the table of routes and nothing else. The last line of its output is
// `done`. ADDRESS is a path or HOST:PORT.
package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

var client http.Client
var dials atomic.Int64

func call(method, path string, body any) (int, map[string]any) {
	var reader io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		must(err == nil, err)
		reader = bytes.NewReader(raw)
	}
	request, err := http.NewRequest(method, base+path, reader)
	must(err == nil, err)
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := client.Do(request)
	must(err == nil, err)
	defer response.Body.Close()
	raw, err := io.ReadAll(response.Body)
	must(err == nil, err)
	answer := map[string]any{}
	if strings.HasPrefix(response.Header.Get("Content-Type"), "application/json") && response.StatusCode == 200 {
		must(json.Unmarshal(raw, &answer) == nil, string(raw))
	} else {
		answer["text"] = string(raw)
	}
	return response.StatusCode, answer
}

func must(right bool, what any) {
	if !right {
		fmt.Println("failed:", what)
		os.Exit(1)
	}
}

type object map[string]any

func message(keyID any, text []byte) {
	status, sealed := call("POST", "/encrypt", object{"key_id": keyID, "plaintext": text})
	must(status == 200, sealed)
	status, opened := call("POST", "/decrypt", object{"key_id": keyID, "ciphertext": sealed["ciphertext"]})
	must(status == 200, opened)
	must(opened["plaintext"] == base64.StdEncoding.EncodeToString(text), "another plaintext")
}

var base string

func transport() *http.Transport {
	network, dialer := "unix", net.Dialer{}
	if !strings.HasPrefix(os.Args[2], "/") {
		network = "tcp"
	}
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			dials.Add(1)
			return dialer.DialContext(ctx, network, os.Args[2])
		},
		MaxIdleConnsPerHost: 8,
	}
}

func main() {
	base = "http://unix"
	if !strings.HasPrefix(os.Args[2], "/") {
		base = "http://" + os.Args[2]
	}
	if os.Args[1] == "first" {
		first(os.Args[3], os.Args[4])
	} else {
		third()
	}
	fmt.Println("done")
}

// ---- the third generation: it keeps JSON tokens as they stand

type server struct {
	http.Client
	name string
}

func (s *server) post(path string, body object, wanted int, out any) error {
	raw, err := json.Marshal(body)
	must(err == nil, err)
	request, err := http.NewRequest("POST", base+path, bytes.NewReader(raw))
	must(err == nil, err)
	request.Header.Set("Content-Type", "application/json")
	response, err := s.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	raw, err = io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	must(response.StatusCode == wanted, fmt.Sprint(path, " ", response.StatusCode, " ", string(raw)))
	return json.Unmarshal(raw, out)
}

func (s *server) create(body object) string {
	var made struct {
		KeyID      string          `json:"key_id"`
		WrappedDEK json.RawMessage `json:"wrapped_dek"`
		KekID      string          `json:"kek_id"`
		KekVersion string          `json:"kek_version"`
		CreatedAt  time.Time       `json:"created_at"`
	}
	err := s.post("/deks", body, 201, &made)
	must(err == nil, err)
	must(made.KekID != "" && made.KekVersion != "" && len(made.WrappedDEK) > 0 && !made.CreatedAt.IsZero(), made)
	return made.KeyID
}

func (s *server) encrypt(keyID string, text []byte) ([]byte, error) {
	var sealed struct {
		Ciphertext json.RawMessage `json:"ciphertext"`
	}
	err := s.post("/encrypt", object{"key_id": keyID, "plaintext": text}, 200, &sealed)
	return sealed.Ciphertext, err
}

func (s *server) decrypt(keyID string, kept []byte) []byte {
	var opened struct {
		Plaintext json.RawMessage `json:"plaintext"`
	}
	err := s.post("/decrypt", object{"key_id": keyID, "ciphertext": kept}, 200, &opened)
	must(err == nil, err)
	return opened.Plaintext
}

type kept struct {
	keyID string
	text  []byte
	token []byte
}

func (s *server) write(thread int) (written []kept) {
	keyID := fmt.Sprint("t:173000000000000000", thread)
	must(s.create(object{"key_id": keyID}) == keyID, keyID)
	for _, size := range []int{2, 15, 40, 300, 4_000, 50_000, 100_000, 40, 40, 300} {
		text := []byte(`"` + strings.Repeat("m", size-2) + `"`)
		token, err := s.encrypt(keyID, text)
		must(err == nil, err)
		written = append(written, kept{keyID, text, token})
	}
	return written
}

func (s *server) read(written []kept) {
	for page := 0; page < 3; page++ {
		for number := 0; number < 25; number++ {
			one := written[number%len(written)]
			must(bytes.Equal(s.decrypt(one.keyID, one.token), one.text), one.keyID)
		}
	}
}

func third() {
	servers := []*server{{name: "one"}, {name: "two"}}
	written := make([][]kept, 2)
	for _, s := range servers {
		s.Transport, s.Timeout = transport(), 10*time.Second
		response, err := s.Get(base + "/healthz")
		must(err == nil && response.StatusCode == 200, err)
		_, err = io.Copy(io.Discard, response.Body)
		must(err == nil && response.Body.Close() == nil, err)
	}
	together := func(work func(number int, s *server)) {
		var busy sync.WaitGroup
		for number, s := range servers {
			busy.Add(1)
			go func(number int, s *server) { defer busy.Done(); work(number, s) }(number, s)
		}
		busy.Wait()
	}
	must(servers[0].create(object{}) != "", "no key_id given")
	together(func(number int, s *server) {
		written[number] = append(s.write(1), s.write(number+2)...) // thread 1 is both's
		s.read(written[number])
	})
	must(dials.Load() == 2, dials.Load())
	fmt.Println("restart")
	var line string
	fmt.Scanln(&line)
	together(func(number int, s *server) {
		s.read(written[1-number]) // what the other one wrote
		s.read(s.write(number + 2))
	})
	must(dials.Load() == 4, dials.Load()) // the old connections were found closed, and one each was opened
}

// ---- the first and second

func first(newKek, otherKek string) {
	client.Transport = transport()
	client.Timeout = 20 * time.Second

	for _, path := range []string{"/healthz", "/health"} {
		status, answer := call("GET", path, nil)
		must(status == 200 && answer["text"] == "ok", path)
	}
	status, made := call("POST", "/create_dek_for_thread", object{"thread_id": "go-1"})
	must(status == 200, made)
	for _, name := range []string{"key_id", "wrapped", "kek_id", "kek_version"} {
		value, isText := made[name].(string)
		must(isText && value != "", name)
	}
	status, wrapped := call("GET", "/get_wrapped?key_id="+made["key_id"].(string), nil)
	must(status == 200 && wrapped["wrapped"] == made["wrapped"], wrapped)
	message(made["key_id"], []byte("héllo"))
	message(made["key_id"], []byte{})
	message(made["key_id"], bytes.Repeat([]byte("0123456789abcdef"), 40_000))

	_, other := call("POST", "/create_dek_for_thread", object{"thread_id": "go-2"})
	_, sealed := call("POST", "/encrypt", object{"key_id": made["key_id"], "plaintext": []byte("x")})
	status, answer := call("POST", "/decrypt", object{"key_id": other["key_id"], "ciphertext": sealed["ciphertext"]})
	must(status == 422, answer)
	status, answer = call("GET", "/get_wrapped?key_id=nosuchkey", nil)
	must(status == 404, answer)

	// A body of a length that is not known beforehand goes out in chunks.
	body, writer := io.Pipe()
	go func() { fmt.Fprintf(writer, `{"thread_id":"go-3"}`); writer.Close() }()
	request, err := http.NewRequest("POST", base+"/create_dek_for_thread", body)
	must(err == nil, err)
	request.Header.Set("Content-Type", "application/json")
	reused := false
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { reused = info.Reused }}
	response, err := client.Do(request.WithContext(httptrace.WithClientTrace(request.Context(), trace)))
	must(err == nil && response.StatusCode == 200 && reused, err)
	_, err = io.Copy(io.Discard, response.Body)
	must(err == nil && response.Body.Close() == nil, err)
	must(dials.Load() == 1, "the connection was not kept")

	status, moved := call("POST", "/rotate_kek", object{"new_kek_hex": newKek})
	must(status == 200 && moved["status"] == "ok" && moved["rewrapped"] == 3.0, moved)
	status, opened := call("POST", "/decrypt", object{"key_id": made["key_id"], "ciphertext": sealed["ciphertext"]})
	must(status == 200 && opened["plaintext"] == "eA==", opened)
	status, rewrapped := call("POST", "/rewrap", object{"key_id": made["key_id"], "new_kek_hex": otherKek})
	must(status == 200 && rewrapped["kek_id"] != moved["kek_id"], rewrapped)

	var callers sync.WaitGroup
	for caller := 0; caller < 8; caller++ {
		callers.Add(1)
		go func(keyID any) {
			defer callers.Done()
			for number := 0; number < 50; number++ {
				message(keyID, []byte(fmt.Sprint("message ", number)))
			}
		}([]any{made["key_id"], other["key_id"]}[caller%2])
	}
	callers.Wait()
	must(dials.Load() <= 16, dials.Load()) // for 800 requests
}
